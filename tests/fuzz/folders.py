"""Fuzz folders: encoders, language models, saved models and runs with files that are damaged, missing or swapped."""

from __future__ import annotations

import contextlib
import functools
import random
import shutil
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

import mllm
from mllm.errors import MLLMError
from mllm.testing import tiny_encoder, tiny_image, tiny_lm
from mllm.training.checkpoint import TrainingState
from mllm.transfer import transfer
from tests.fuzz.fixtures import plain_recipe, save_yaml, write_data
from tests.fuzz.harness import Act
from tests.fuzz.mutate import damage_file


class Killed(BaseException):
    """Ends training as a signal would."""


@contextlib.contextmanager
def killed_after(checkpoints: int) -> Any:
    """End training after it has written so many checkpoints."""
    write, written = TrainingState.write, 0

    def counted(state: TrainingState, folder: Path) -> None:
        nonlocal written
        write(state, folder)
        written += 1
        if written == checkpoints:
            raise Killed

    TrainingState.write = counted  # type: ignore[assignment, method-assign]
    try:
        with contextlib.suppress(Killed):
            yield
    finally:
        TrainingState.write = write  # type: ignore[method-assign]


class Folders:
    """Folders, of which one or two files are damaged."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._data = write_data(folder / "data")
        self._parts = {"encoder": Path(tiny_encoder(folder / "encoder")), "lm": Path(tiny_lm(folder / "lm"))}
        others = Path(tiny_encoder(folder / "other-encoder", dim=16)), Path(tiny_lm(folder / "other-lm", dim=16))
        self._others = [file for other in others for file in other.iterdir()]
        recipe = plain_recipe(str(self._parts["encoder"]), str(self._parts["lm"]), self._data, cache="off")
        self._recipe = str(save_yaml(folder / "recipe.yaml", recipe))
        self._whole = mllm.train(self._recipe, out=folder / "whole").path
        with killed_after(1):
            mllm.train(self._recipe, out=folder / "killed")
        self._killed = folder / "killed"
        self._answer = self._answers(mllm.load(self._whole))
        self._acts: dict[str, Callable[[int], None]] = {
            "encoder": functools.partial(self._part, "encoder"),
            "lm": functools.partial(self._part, "lm"),
            "saved model": self._saved,
            "init.from": self._initialized,
            "resume": self._resumed,
            "evaluation": self._evaluated,
        }

    def named(self) -> dict[str, Act]:
        """Return the cases of weights that were replaced, and of paths that lead nowhere."""
        acts: dict[str, Act] = {
            "resume on other weights": self._other_weights,
            "a flipped bit in a model that init.from names": self._flipped,
        }
        for path in ("", ".", "/", "/etc", "x" * 300, "x" * 5000, "a\0b", "/dev/null", str(self._data)):
            acts[f"load {path[:20]!r} of {len(path)}"] = functools.partial(mllm.load, path)
            acts[f"encoder {path[:20]!r} of {len(path)}"] = functools.partial(
                mllm.assemble, path, str(self._parts["lm"])
            )
            acts[f"lm {path[:20]!r} of {len(path)}"] = functools.partial(
                mllm.assemble, str(self._parts["encoder"]), path
            )
            acts[f"resume {path[:20]!r} of {len(path)}"] = functools.partial(mllm.train, self._recipe, resume=path)
        return acts

    def draw(self, chance: random.Random) -> tuple[str, Act]:
        """Return a folder of a random kind with damaged files; the damage is known when the case has run."""
        kind = chance.choice(list(self._acts))
        seed = chance.randrange(10**9)
        return f"{kind}, damage {seed}", functools.partial(self._run, kind, seed)

    def _run(self, kind: str, seed: int) -> None:
        try:
            self._acts[kind](seed)
        except MLLMError:
            raise
        except BaseException as error:
            error.args = (f"{self._damage}: {error}",)
            raise

    def _copied(self, source: Path, seed: int) -> Path:
        """Return a damaged copy of a folder."""
        chance, copy = random.Random(seed), self._folder / "copy"
        if copy.exists():
            shutil.rmtree(copy)
        shutil.copytree(source, copy)
        files = sorted(file for file in copy.rglob("*") if file.is_file() and file.suffix not in (".png", ".html"))
        self._damage = ""
        for file in chance.sample(files, chance.choice((1, 1, 1, 2))):
            self._damage += damage_file(file, chance, [*files, *self._others] if file.is_file() else []) + "; "
        return copy

    def _answers(self, model: Any) -> list[Any]:
        image = tiny_image(1)
        scores = [float(score) for score in model.score([image, "which?"], ["one", "two"])]
        return [*map(str, model.generate([[image, "red"]], max_new_tokens=2)), *scores]

    def _assembled(self) -> Any:
        encoder, lm = map(str, self._parts.values())
        return mllm.assemble(encoder, lm, {"type": "linear", "tokens": 4})

    def _part(self, name: str, seed: int) -> None:
        """Assemble a model with a damaged part: it answers, with finite scores or NaN as its weights are."""
        folders = {**self._parts, name: self._copied(self._parts[name], seed)}
        model = mllm.assemble(str(folders["encoder"]), str(folders["lm"]))
        _ = model.encoder.fingerprint, model.lm.fingerprint
        self._answers(model)

    def _saved(self, seed: int) -> None:
        """Load a run's model: it is the same model, since everything that was written is verified."""
        answer = self._answers(mllm.load(self._copied(self._whole, seed)))
        edited = "assembly.json" in self._damage  # whoever changes the specification has another model
        assert edited or answer == self._answer, f"another model: {answer} instead of {self._answer}"

    def _initialized(self, seed: int) -> None:
        source = self._copied(self._whole, seed)
        model, right = (self._assembled() for _ in "ab")
        transfer(model, source)
        transfer(right, self._whole)
        for name, tensor in right.trained_state().items():
            assert torch.equal(model.trained_state()[name], tensor), f"other tensors: {name}"

    def _resumed(self, seed: int) -> None:
        """Resume a run: it ends as the uninterrupted one did."""
        run = self._copied(self._killed, seed)
        mllm.train(self._recipe, resume=run)
        for name in ("model/assembly.json", "log.jsonl"):
            if name in self._damage:  # its rows before the checkpoint are the past, which nothing repeats
                continue
            assert (run / name).read_bytes() == (self._whole / name).read_bytes(), f"{name} is another"

    def _evaluated(self, seed: int) -> None:
        """Compare, score and continue a damaged evaluation."""
        done = self._folder / "evaluation"
        suite = str(self._data / "suite.yaml")
        if not done.exists():
            mllm.evaluate(mllm.load(self._whole), suite, out=done, baselines=["blind"])
        copy = self._copied(done, seed)
        evaluation = import_module("mllm.evaluation")
        report = evaluation.compare(copy, done, None, out=self._folder / "compared")
        assert report.summary["n"] == 4, report.summary["n"]

    def _other_weights(self) -> None:
        """Resume a run after its language model was replaced."""
        kept = self._folder / "kept"
        shutil.copytree(self._parts["lm"], kept)
        run = Path(shutil.copytree(self._killed, self._folder / "other"))
        try:
            tiny_lm(self._parts["lm"], seed=9)
            mllm.train(self._recipe, resume=run)
        finally:
            shutil.rmtree(self._parts["lm"])
            shutil.copytree(kept, self._parts["lm"])
        raise AssertionError("it was resumed")

    def _flipped(self) -> None:
        source = Path(shutil.copytree(self._whole, self._folder / "flipped"))
        (file,) = (source / "model").glob("*.safetensors")
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
        transfer(self._assembled(), source)
        raise AssertionError("it was used")
