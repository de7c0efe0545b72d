"""Fuzz full disks: no file grows beyond a random size while something is written; with space it works, bit for bit."""

from __future__ import annotations

import contextlib
import functools
import json
import random
import resource
import shutil
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from PIL import Image

import mllm
from mllm.encoders.feature_store import FeatureStore
from mllm.errors import MLLMError
from mllm.export.export import export
from mllm.outputs import ImagePart, Output, with_files
from mllm.scorers.index import ImageIndex
from mllm.testing import tiny_clip, tiny_image
from tests.fuzz.fixtures import parts, plain_recipe, save_yaml, write_data
from tests.fuzz.folders import killed_after
from tests.fuzz.harness import Act

SLOW = ("train", "resume", "evaluate", "export")
SIZES = (0, 1, 10, 100, 1000, 3000, 10_000, 30_000, 100_000)


@contextlib.contextmanager
def full_disk(size: int = 0) -> Iterator[None]:
    """Let no file grow beyond a number of bytes, which is refused as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


class Disk:
    """Everything that is written, on a disk that is full at a random size of a file."""

    def __init__(self, folder: Path) -> None:
        self._folder, data = folder, write_data(folder / "data")
        self._data = data
        encoder, lm = parts(folder)
        self._recipe = str(save_yaml(folder / "recipe.yaml", plain_recipe(encoder, lm, data, cache="off")))
        self._model = mllm.assemble(encoder, lm, {"type": "linear", "tokens": 4})
        self._exported = {"model": folder / "clip", "layer": -1}, lm, "linear"
        self._suite = str(data / "suite.yaml")
        self._predictions = folder / "predictions.jsonl"
        self._predictions.write_text("".join(json.dumps({"id": f"{n}.png", "answer": "a"}) + "\n" for n in range(4)))
        self._writers: dict[str, Callable[[Path], Any]] = {
            "train": lambda out: mllm.train(self._recipe, out=out / "run"),
            "resume": self._resume,
            "evaluate": lambda out: mllm.evaluate(self._model, self._suite, out=out / "eval", baselines=["blind"]),
            "score": self._score,
            "compare": self._compare,
            "save": lambda out: self._model.save(out / "model"),
            "export": self._export,
            "conversation": lambda out: self._model.chat().save(out / "chat.json"),
            "features": self._features,
            "index": lambda out: ImageIndex(torch.ones(9, 9), ["a.png"] * 9, "m").save(out / "index.safetensors"),
            "image": lambda out: with_files(Output([ImagePart(Image.effect_noise((64, 64), 9))]), out / "images"),
        }
        self._right: dict[str, dict[str, bytes]] = {}

    def named(self) -> dict[str, Act]:
        """Return each writer on a disk without any space."""
        return {f"{name}, no byte": functools.partial(self._check, name, 0) for name in self._writers}

    def draw(self, chance: random.Random) -> tuple[str, Act]:
        """Return a writer and the size at which the disk is full."""
        weights = [1 if name in SLOW else 6 for name in self._writers]
        (name,), size = chance.choices(list(self._writers), weights), chance.choice(SIZES) + chance.randrange(100)
        return f"{name}, {size} bytes", functools.partial(self._check, name, size)

    def _check(self, name: str, size: int) -> None:
        """Write with too little space, and again with enough, into the same folder; the result is the right one."""
        if name not in self._right:
            out = self._new()
            self._writers[name](out)
            self._right[name] = contents(out)
        out, error = self._new(), None
        try:
            with full_disk(size):
                self._writers[name](out)
        except MLLMError as raised:
            error = raised
        litter = [path.name for path in out.rglob(".*") if path.is_file() and path.name not in (".lock", ".gitignore")]
        assert not litter, f"partial files are left: {litter}"
        if error is not None:
            assert "written" in str(error) or "large" in str(error), f"no word on writing: {error}"
            if name == "train" and (out / "run" / "recipe.yaml").is_file():
                mllm.train(self._recipe, resume=out / "run")
            else:
                out = out if name in ("resume", "evaluate") else self._new()
                self._writers[name](out)
        differing = [file for file, data in self._right[name].items() if contents(out).get(file) != data]
        assert not differing, f"other contents: {differing[:4]}"
        if error is not None:
            raise error

    def _new(self) -> Path:
        out = self._folder / "out"
        if out.exists():
            shutil.rmtree(out)
        out.mkdir()
        return out

    def _resume(self, out: Path) -> None:
        if not (out / "run").exists():
            with _unlimited():
                if not (killed := self._folder / "killed").exists():
                    with killed_after(1):
                        mllm.train(self._recipe, out=killed)
                shutil.copytree(killed, out / "run")
        mllm.train(self._recipe, resume=out / "run")

    def _export(self, out: Path) -> None:
        with _unlimited():
            if not (self._folder / "clip").exists():
                tiny_clip(self._folder / "clip")
            encoder, lm, connector = self._exported
            model = mllm.assemble({**encoder, "model": str(encoder["model"])}, lm, connector)
        export(model, out / "export", to="hf-llava")

    def _compare(self, out: Path) -> None:
        done = self._folder / "evaluated"
        if not done.exists():
            with _unlimited():
                mllm.evaluate(self._model, self._suite, out=done, baselines=["blind"])
        import_module("mllm.evaluation").compare(done, done, None, out=out / "compared")

    def _score(self, out: Path) -> None:
        import_module("mllm.evaluation").score(self._predictions, self._suite, None, out=out / "scored")

    def _features(self, out: Path) -> None:
        store = FeatureStore(self._model, folder=out / "features")
        store([tiny_image(seed) for seed in range(4)])
        store.flush()


@contextlib.contextmanager
def _unlimited() -> Iterator[None]:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with full_disk(limits[1]):
        yield


def plain_bytes(path: Path) -> bytes:
    """Return a file's bytes; the header of a safetensors file is in no order, so it is sorted."""
    data = path.read_bytes()
    if path.suffix != ".safetensors":
        return data
    end = 8 + int.from_bytes(data[:8], "little")
    return json.dumps(json.loads(data[8:end]), sort_keys=True).encode() + data[end:]


def contents(folder: Path) -> dict[str, bytes]:
    """Return the contents of the files that are the same each time: neither times nor drawings."""
    kinds = (".safetensors", ".jsonl", ".yaml")
    files = (
        path
        for path in folder.rglob("*")
        if path.is_file() and (path.suffix in kinds or path.name in NAMED) and path.name != SPEED
    )
    return {path.relative_to(folder).as_posix(): plain_bytes(path) for path in files}


SPEED = "speed.jsonl"
NAMED = ("assembly.json", "frozen.json", "data.json", "chat.json", "config.json")
