"""Write and reopen a run: the folder that training writes and everything else reads.

``recipe.yaml`` (resolved), ``environment.json`` (versions, commit), ``data.json`` (what identifies the data),
``log.jsonl`` (losses, which a repeated run has again), ``speed.jsonl`` (what was measured in each step), ``loss.png``,
``time.json`` (minutes), ``frozen.json`` (hashes of the frozen parts, before and after), ``model/`` (see `mllm.saving`),
``stages/NAME/`` (the models of the stages before the last), ``eval/``.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import subprocess
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from mllm.config.loading import continued, dump, load
from mllm.config.recipe import Recipe
from mllm.config.yaml_text import mapping_of, parse_yaml, read_text
from mllm.errors import MLLMError
from mllm.processes import in_main_process, processes
from mllm.saving import STAGES
from mllm.system import Lock, parse_json, read_json, read_regular, remove_partial, write
from mllm.training.plots import loss_plot, read_log
from mllm.training.signals import Signals

LOG, SPEED = "log.jsonl", "speed.jsonl"
COMPLETE = "model/assembly.json"  # it is written last
PACKAGES = ("mllm-assembly", "torch", "transformers", "accelerate", "peft")


class Run:
    """One training run's folder; of several processes the main one writes it, and locks it until `close`.

    Attributes:
        signals: that stop training.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.writes = path, processes().is_main_process
        self.signals = Signals()
        self._lock = Lock(path)

    @classmethod
    def create(cls, path: Path, recipe: Recipe) -> Run:
        """Create the folder of a new run with the resolved recipe and the environment.

        Raises:
            MLLMError: the folder is not empty (nothing is overwritten), in use by another process, or cannot be
                created.
        """
        run = cls(path)
        in_main_process(lambda: run._begin(recipe))
        return run

    @classmethod
    def reopen(cls, path: Path, recipe: Recipe, *, accept: bool) -> Run:
        """Return a run that was interrupted, to continue it.

        Args:
            path: its folder.
            recipe: the recipe to continue with.
            accept: continue although the recipe changed since; the new one is recorded.

        Raises:
            MLLMError: there is no run, it is complete or in use by another process, or the recipe changed: every change
                is listed.
        """
        run = cls(path)
        in_main_process(lambda: run._continue(dump(recipe), accept=accept))
        return run

    def close(self) -> None:
        """Let another process continue the run."""
        self._lock.release()

    def _begin(self, recipe: Recipe) -> None:
        with self._locked():
            if any(entry.name != Lock.NAME for entry in self.path.iterdir()):
                raise MLLMError(f"{self.path} is not empty. Give another folder with --out, or remove this one.")
            write(self.path / "recipe.yaml", lambda file: file.write_text(dump(recipe)))
            about = {**environment(), "processes": str(processes().num_processes)}
            if allowed := {path: model for stage in recipe.stages for path, model in stage.remote_code().items()}:
                about["remote_code"] = ", ".join(f"{path}: {model}" for path, model in allowed.items())
            write(self.path / "environment.json", lambda file: file.write_text(json.dumps(about, indent=2) + "\n"))

    def _continue(self, recipe: str, *, accept: bool) -> None:
        written = self.path / "recipe.yaml"
        if not os.path.isfile(written):
            raise MLLMError(f"There is no run in {str(self.path)[:200]}: expected recipe.yaml there.")
        with self._locked():
            if (self.path / COMPLETE).is_file():
                raise MLLMError(f"The run {self.path} is complete. `mllm eval {self.path}` evaluates it.")
            before = mapping_of(parse_yaml(_today(written), str(written)), str(written))
            differing = changes(before, mapping_of(parse_yaml(recipe, "the recipe"), "the recipe"))
            if differing and not accept:
                listed = "".join(f"\n  {change}" for change in differing)
                raise MLLMError(
                    f"The recipe changed since {self.path} was started; --accept-changes continues with it:{listed}"
                )
            if accept:
                (self.path / "data.json").unlink(missing_ok=True)  # the data may have changed as well
            write(written, lambda file: file.write_text(recipe))

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Lock the folder, and remove what a killed process left in it; after an error it is not locked."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock.acquire()
            for folder in (self.path, self.path / "model", *self.path.glob(f"{STAGES}/*")):
                remove_partial(folder)
            yield
        except OSError as error:
            self._lock.release()
            raise MLLMError(
                f"The run folder {str(self.path)[:200]} cannot be written: {error.strerror or error}."
            ) from None
        except BaseException:
            self._lock.release()
            raise

    def rewind(self, done: Sequence[str], stage: str, step: int) -> None:
        """Remove from the logs the rows after a checkpoint: those steps are done, and logged, again.

        Args:
            done: the stages before the checkpoint's, whose rows are kept.
            stage: the checkpoint's.
            step: the checkpoint's.

        Raises:
            MLLMError: a line is damaged that is not the last.
        """
        for path in (self.path / LOG, self.path / SPEED):
            if self.writes and os.path.lexists(path):
                self._rewind(path, done, stage, step)

    def _rewind(self, path: Path, done: Sequence[str], stage: str, step: int) -> None:
        kept = []
        with self._written(path.name):
            lines = read_regular(path).decode("utf-8", errors="replace").splitlines()
        for number, line in enumerate(lines, start=1):
            try:
                row = parse_json(line)
                before = "skipped" in row or 0 < row.get("step", 0) <= step
                if row["stage"] in done or (row["stage"] == stage and before):
                    kept.append(line + "\n")
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                if number < len(lines):  # a kill cuts the last line only
                    raise MLLMError(
                        f"{path}, line {number}, is damaged: {error}. Remove the line, or restore the file."
                    ) from None
        with self._written(path.name):
            write(path, lambda file: file.write_text("".join(kept)))

    def log(self, **row: Any) -> None:
        """Append one row to the log."""
        self._append(LOG, row)

    def log_speed(self, **row: Any) -> None:
        """Append one row to the log of what was measured."""
        self._append(SPEED, row)

    def _append(self, name: str, row: dict[str, Any]) -> None:
        if not self.writes:
            return
        with self._written(name), (self.path / name).open("a") as stream:
            stream.write(json.dumps(row) + "\n")

    def record(self, name: str, content: Any) -> None:
        """Write a JSON file of the run, whole or not at all."""
        if not self.writes:
            return
        with self._written(name):
            write(self.path / name, lambda file: file.write_text(json.dumps(content, indent=2) + "\n"))

    def note_data(self, stage: str, sources: Any, *, resumed: bool) -> None:
        """Record what identifies the data of a stage.

        Raises:
            MLLMError: the stage is ``resumed``, and its data are not those that it was started with.
        """
        path = self.path / "data.json"
        try:
            known = mapping_of(read_json(path), str(path)) if os.path.lexists(path) else {}
        except (OSError, ValueError) as error:
            raise MLLMError(
                f"{path} cannot be read: {error}. Remove it, if the data are those that the run was started with."
            ) from None
        if resumed and known and stage not in known:
            raise MLLMError(f"{path} has nothing on stage {stage}. Restore it, or remove it to skip this comparison.")
        if resumed and known.get(stage, sources) != sources:
            raise MLLMError(
                f"The data of stage {stage} changed since {self.path} was started. Restore the data, or continue with "
                "--accept-changes."
            )
        self.record(path.name, {**known, stage: sources})

    def plot(self) -> Path:
        """Draw ``loss.png`` from the log, if it has losses: a closed-form fit has none."""
        out = self.path / "loss.png"
        if self.writes and (self.path / LOG).is_file() and read_log(self.path / LOG):
            with self._written(out.name):
                notes = data_notes(load(str(self.path / "recipe.yaml")))
                write(out, lambda file: loss_plot(self.path / LOG, file, notes))
        return out

    @contextlib.contextmanager
    def _written(self, name: str) -> Iterator[None]:
        """Explain why a file of the run cannot be written, if it cannot."""
        try:
            yield
        except OSError as error:
            reason = error.strerror or error
            raise MLLMError(f"{self.path / name} cannot be written: {reason}. Free some disk space.") from None


def data_notes(recipe: Recipe) -> list[str]:
    """Return a line for each stage whose validation loss is of other data than its training loss."""
    notes = []
    for stage in recipe.stages:
        train, val = ([spec.label for spec in specs] for specs in (stage.data.train, stage.data.val))
        if stage.train and val and sorted(train) != sorted(val):
            notes.append(f"{stage.name}: training loss on {', '.join(train)}; validation loss on {', '.join(val)}")
    return notes


def changes(before: dict[str, Any], after: dict[str, Any], path: str = "") -> list[str]:
    """Return every key whose value differs between two resolved recipes, as ``key: before -> after``."""
    differing = []
    for key in [*before, *(key for key in after if key not in before)]:
        old, new = before.get(key), after.get(key)
        if isinstance(old, list) and isinstance(new, list):
            old, new = dict(enumerate(old)), dict(enumerate(new))
        if isinstance(old, dict) and isinstance(new, dict):
            differing += changes(old, new, f"{path}{key}.")
        elif old != new:
            differing.append(f"{path}{key}: {old!r} -> {new!r}")
    return differing


def _today(written: Path) -> str:
    """Return a run's recipe with the keys that came to recipes since it was written, at their defaults."""
    with contextlib.suppress(MLLMError):
        return dump(continued(load(str(written)), written))
    return read_text(written)


def free_folder(name: str) -> Path:
    """Return ``runs/NAME``, or the first of ``runs/NAME-2``, ``-3``, ... that is not taken."""
    paths = (Path("runs") / (name if number == 1 else f"{name}-{number}") for number in range(1, 10_000))
    return next(path for path in paths if not os.path.lexists(path))


def environment() -> dict[str, str]:
    """Return the versions that a result depends on, and the working directory's commit."""
    versions = {"python": platform.python_version(), "machine": platform.machine()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "absent"
    return {**versions, "commit": _commit()}


def _commit() -> str:
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.strip() or "unknown"
