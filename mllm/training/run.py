"""Write and reopen a run: the folder that training writes and everything else reads.

``recipe.yaml`` (resolved), ``environment.json`` (versions, commit), ``data.json`` (what identifies the data),
``log.jsonl`` (losses), ``loss.png``, ``time.json`` (minutes), ``frozen.json`` (hashes of the frozen parts, before and
after), ``model/`` (see `mllm.saving`), ``eval/``.
"""

from __future__ import annotations

import contextlib
import json
import platform
import subprocess
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

from mllm.config.loading import continued, dump, load
from mllm.config.recipe import Recipe
from mllm.errors import MLLMError
from mllm.processes import processes
from mllm.system import write
from mllm.training.plots import loss_plot

PACKAGES = ("mllm-assembly", "torch", "transformers", "accelerate", "peft")


class Run:
    """One training run's folder; of several processes the main one writes it."""

    def __init__(self, path: Path) -> None:
        self.path, self.writes = path, processes().is_main_process

    @classmethod
    def create(cls, path: Path, recipe: str) -> Run:
        """Create the folder of a new run with the resolved recipe (YAML text) and the environment.

        Raises:
            MLLMError: the folder is not empty (nothing is overwritten), or cannot be created.
        """
        run = cls(path)
        if not run.writes:
            return run
        try:
            path.mkdir(parents=True, exist_ok=True)
            if any(path.iterdir()):
                raise MLLMError(f"{path} is not empty. Give another folder with --out, or remove this one.")
            write(path / "recipe.yaml", lambda file: file.write_text(recipe))
            about = {**environment(), "processes": str(processes().num_processes)}
            write(path / "environment.json", lambda file: file.write_text(json.dumps(about, indent=2) + "\n"))
        except OSError as error:
            raise MLLMError(f"The run folder {path} cannot be written: {error.strerror or error}.") from None
        return run

    @classmethod
    def reopen(cls, path: Path, recipe: str, *, accept: bool) -> Run:
        """Return a run that was interrupted, to continue it.

        Args:
            path: its folder.
            recipe: the resolved recipe (YAML text) to continue with.
            accept: continue although the recipe changed since; the new one is recorded.

        Raises:
            MLLMError: there is no run, it is complete, or the recipe changed: every change is listed.
        """
        written = path / "recipe.yaml"
        if not written.is_file():
            raise MLLMError(f"There is no run in {path}: expected recipe.yaml there.")
        if (path / "model" / "assembly.json").is_file():
            raise MLLMError(f"The run {path} is complete: there is nothing to resume. `mllm eval {path}` evaluates it.")
        differing = changes(yaml.safe_load(_today(written)), yaml.safe_load(recipe))
        if differing and not accept:
            listed = "".join(f"\n  {change}" for change in differing)
            raise MLLMError(f"The recipe changed since {path} was started; --accept-changes continues with it:{listed}")
        run = cls(path)
        if accept and run.writes:
            (path / "data.json").unlink(missing_ok=True)  # the data may have changed as well
        processes().wait_for_everyone()  # all have read it
        if run.writes:
            write(written, lambda file: file.write_text(recipe))
        return run

    def rewind(self, done: Sequence[str], stage: str, step: int) -> None:
        """Remove from the log the rows after a checkpoint: those steps are done, and logged, again.

        Args:
            done: the stages before the checkpoint's, whose rows are kept.
            stage: the checkpoint's.
            step: the checkpoint's.
        """
        path = self.path / "log.jsonl"
        if not self.writes or not path.is_file():
            return
        kept = []
        for line in path.read_text().splitlines():
            with contextlib.suppress(ValueError):  # a line cut short by a kill
                row = json.loads(line)
                before = "skipped" in row or 0 < row.get("step", 0) <= step
                if row["stage"] in done or (row["stage"] == stage and before):
                    kept.append(line + "\n")
        with self._written(path.name):
            write(path, lambda file: file.write_text("".join(kept)))

    def log(self, **row: Any) -> None:
        """Append one row to the log."""
        if not self.writes:
            return
        with self._written("log.jsonl"), (self.path / "log.jsonl").open("a") as stream:
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
        known = json.loads(path.read_text()) if path.is_file() else {}
        if resumed and known.get(stage, sources) != sources:
            raise MLLMError(
                f"The data of stage {stage} changed since {self.path} was started. Restore the data, or continue with "
                "--accept-changes."
            )
        self.record(path.name, {**known, stage: sources})

    def plot(self) -> Path:
        """Draw ``loss.png`` from the log."""
        out = self.path / "loss.png"
        if self.writes and (self.path / "log.jsonl").is_file():
            with self._written(out.name):
                notes = data_notes(load(str(self.path / "recipe.yaml")))
                write(out, lambda file: loss_plot(self.path / "log.jsonl", file, notes))
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
    return written.read_text()


def free_folder(name: str) -> Path:
    """Return ``runs/NAME``, or the first of ``runs/NAME-2``, ``-3``, ... that is not taken."""
    paths = (Path("runs") / (name if number == 1 else f"{name}-{number}") for number in range(1, 10_000))
    return next(path for path in paths if not path.exists())


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
