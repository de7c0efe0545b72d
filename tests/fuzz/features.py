"""Fuzz the cached features: damaged, foreign and wrong shards are computed again, and the features are right."""

from __future__ import annotations

import functools
import random
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import mllm
from mllm.encoders.feature_store import FeatureStore
from mllm.hub.verified import save_verified
from mllm.testing import tiny_encoder, tiny_image, tiny_lm
from tests.fuzz.harness import Act
from tests.fuzz.mutate import damage_file


class Features:
    """Folders of feature shards."""

    def __init__(self, folder: Path) -> None:
        parts = tiny_encoder(folder / "encoder"), tiny_lm(folder / "lm")
        self._model, self._folder = mllm.assemble(*parts), folder
        other = mllm.assemble(tiny_encoder(folder / "other", dim=16), parts[1])
        self._images = [tiny_image(seed) for seed in range(4)]
        self._right = self._model.features(self._images)
        for name, model in (("shards", self._model), ("foreign", other)):
            for half in (self._images[:2], self._images[2:]):
                store = FeatureStore(model, folder=folder / name)
                store(half)
                store.flush()
        self._shards = sorted((folder / "shards").iterdir())
        self._others = [*self._shards, *(folder / "foreign").iterdir(), *Path(parts[0]).iterdir()]

    def named(self) -> dict[str, Act]:
        """Return shards of another shape, under another name, and without a checksum."""
        rows = load_file(self._shards[0])
        first = next(iter(rows))
        changes = {
            "no rows": {},
            "one patch": {name: row[:1].clone() for name, row in rows.items()},
            "two images' patches": {name: row.repeat(2, 1) for name, row in rows.items()},
            "a vector": {name: row[0].clone() for name, row in rows.items()},
            "another width": {name: row[:, :3].clone() for name, row in rows.items()},
            "integers": {name: row.long() for name, row in rows.items()},
            "a wrong row": {first: rows[first][:0].clone()},
            "other keys": {f"x{name}": row for name, row in rows.items()},
        }
        acts: dict[str, Act] = {}
        for name, tensors in changes.items():
            for verified in (True, False):
                acts[f"{name}, {'with' if verified else 'without'} a checksum"] = functools.partial(
                    self._replaced, tensors, verified
                )
        return acts

    def draw(self, chance: random.Random) -> tuple[str, Act]:
        """Return damaged shards."""
        seed = chance.randrange(10**9)
        return f"damage {seed}", functools.partial(self._damaged, seed)

    def _damaged(self, seed: int) -> None:
        chance, folder = random.Random(seed), self._copy()
        shards = sorted(folder.iterdir())
        for shard in chance.sample(shards, chance.choice((1, 1, 2))):
            damage_file(shard, chance, self._others)
        self._check(folder)

    def _replaced(self, tensors: dict[str, torch.Tensor], verified: bool) -> None:
        folder = self._copy()
        shard = folder / self._shards[0].name
        if verified:
            save_verified(shard, tensors)
        else:
            save_file(tensors, shard)
        self._check(folder)

    def _copy(self) -> Path:
        folder = self._folder / "copy"
        if folder.exists():
            shutil.rmtree(folder)
        return Path(shutil.copytree(self._folder / "shards", folder))

    def _check(self, folder: Path) -> None:
        """The features are those of the encoder, and what is written then is read back."""
        for _ in range(2):
            store = FeatureStore(self._model, folder=folder)
            features = store(self._images)
            assert features.dtype == self._right.dtype and torch.equal(features, self._right), "other features"
            store.flush()
