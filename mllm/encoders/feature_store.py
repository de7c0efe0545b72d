"""Cache the features of a frozen encoder in memory and on disk, so that each image is encoded once.

In memory they are the host's: a GPU holds only the features of the batch that is computed.

On disk, features are in a folder named by a hash of everything that determines them (the encoder's weights, layer,
selection, resolution, processor and dtype), under a hash of the image's content. When any of these changes, another
folder is used, so no stale feature is ever read. Images of the next steps are opened in background threads.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mllm.errors import MLLMError
from mllm.hub.fingerprints import tensor_hash
from mllm.media.images import ImageSource, source_of
from mllm.model import Model
from mllm.system import cache_dir, write

LIMIT = 4 * 2**30  # bytes
THREADS = min(8, os.cpu_count() or 1)  # that open images in the background


class FeatureStore:
    """Features of images, in memory and, given a folder, on disk.

    Args:
        model: the model whose `features` are cached.
        limit: the most bytes that are cached; further features are computed each time. None: no limit.
        chunk: the number of images per forward pass of the encoder.
        folder: the folder of the shards on disk; None: memory only.
    """

    def __init__(self, model: Model, *, limit: int | None = LIMIT, chunk: int = 8, folder: Path | None = None) -> None:
        self._model, self._limit, self._chunk, self._folder = model, limit, chunk, folder
        self._cached: dict[str, Tensor] = {}
        self._new: list[str] = []  # the keys that are not on disk yet
        self._stored = _index(folder) if folder else {}
        self._bytes = sum(path.stat().st_size for path in set(self._stored.values()))
        self._opening: list[dict[Any, Future[Any]]] = [{}, {}]  # images being opened for this step and for the next
        self._threads = ThreadPoolExecutor(THREADS)

    def __call__(self, images: Sequence[Any]) -> Tensor:
        """Return features ``(I, P, D_vis)`` of images in any accepted form, in order, on the model's device."""
        sources = [source_of(image) for image in images]
        keys = [self._model.encoder.key(source) for source in sources]
        features = {key: self._find(key) for key in keys if key in self._cached or key in self._stored}
        missing = {key: source for key, source in zip(keys, sources, strict=True) if key not in features}
        names = list(missing)
        for start in range(0, len(names), self._chunk):
            chunk = names[start : start + self._chunk]
            opened = [self.opened(missing[key]) for key in chunk]
            for key, row in zip(chunk, self._model.features(opened), strict=True):
                features[key] = row
                self._cache(key, row)
        return torch.stack([features[key].to(self._model.device) for key in keys])

    def expect(self, images: Sequence[Any]) -> None:
        """Start opening images that will be requested, except those whose features are cached.

        Images of the call before the last that were not requested are dropped.
        """
        sources = {image for image in images if isinstance(image, ImageSource)} - self._opening[1].keys()
        self._opening = [self._opening[1], {source: self._threads.submit(self._prefetch, source) for source in sources}]

    def opened(self, image: Any) -> Any:
        """Return an image opened for the encoder's `preprocess`.

        Raises:
            MLLMError: the image cannot be read.
        """
        futures = [step.pop(image) for step in self._opening if isinstance(image, ImageSource) and image in step]
        opened = futures[0].result() if futures else None
        return self._model.encoder.open(image) if opened is None else opened

    def _prefetch(self, source: ImageSource) -> Any:
        """Return an opened image, or None if its features are cached."""
        encoder = self._model.encoder
        if not self._model.encoder_trains:
            key = encoder.key(source)
            if key in self._cached or key in self._stored:
                return None
        return encoder.open(source)

    def flush(self) -> None:
        """Write new features to a shard on disk, atomically: an interrupted write leaves no file.

        Raises:
            MLLMError: the folder cannot be written.
        """
        if self._folder is None or not self._new:
            return
        rows = {key: self._cached[key].contiguous() for key in self._new}
        path = self._folder / f"{hashlib.sha256(''.join(rows).encode()).hexdigest()[:16]}.safetensors"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            write(path, lambda file: save_file(rows, file))
        except (OSError, SafetensorError) as error:
            raise MLLMError(
                f"The features could not be written to {self._folder}: {error}. Free some disk space, or set cache=off."
            ) from error
        self._stored |= dict.fromkeys(rows, path)
        self._new = []

    def _find(self, key: str) -> Tensor:
        if key not in self._cached:
            with safe_open(self._stored[key], framework="pt") as shard:
                for name in shard.keys():  # noqa: SIM118  # it is not a mapping
                    self._cached.setdefault(name, shard.get_tensor(name))
        return self._cached[key]

    def _cache(self, key: str, row: Tensor) -> None:
        size = row.numel() * row.element_size()
        if self._limit is None or self._bytes + size <= self._limit:
            self._cached[key] = row.to("cpu", copy=True)  # a view would keep the whole chunk in memory
            self._new.append(key)
            self._bytes += size


def open_store(model: Model, cache: str) -> FeatureStore:
    """Return the feature store for a recipe's ``cache`` setting.

    Args:
        model: the model whose features are cached.
        cache: ``auto`` caches up to 4 GiB in memory and in the user's cache folder, ``on`` without a limit; ``off``
            computes the features each time.
    """
    if cache == "off" or not model.encoder.cacheable:
        return FeatureStore(model, limit=0)
    return FeatureStore(model, limit=LIMIT if cache == "auto" else None, folder=features_folder(model))


def features_folder(model: Model) -> Path:
    """Return the cache folder for the features of this encoder with its weights and settings."""
    encoder = model.encoder
    identity = {
        "weights": encoder.fingerprint,
        "kind": type(encoder).__name__,
        "dtypes": sorted({str(parameter.dtype) for parameter in encoder.parameters()}),
        "settings": encoder.settings(),
    }
    if model.spec.trains("encoder"):
        identity["trained"] = tensor_hash(encoder)
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()
    return cache_dir() / "features" / digest[:32]


def _index(folder: Path) -> dict[str, Path]:
    """Return the shard of every key on disk; damaged shards are skipped, so their features are computed again."""
    shards: dict[str, Path] = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as shard:
                shards |= dict.fromkeys(shard.keys(), path)
        except (SafetensorError, OSError):
            continue
    return shards
