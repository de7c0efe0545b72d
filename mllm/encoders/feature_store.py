"""Cache the features of a frozen encoder in memory and on disk, so that each image is encoded once.

In memory they are the host's: a GPU holds only the features of the batch that is computed.

On disk, features are in a folder named by a hash of everything that determines them (the encoder's weights,
configuration, layer, selection, resolution, preprocessing and dtype), under a hash of the image's content. When any of
these changes, another folder is used, so no stale feature is ever read. A shard is verified when it is read; features
of a damaged one are computed again. Images of the next steps are opened in background threads.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mllm.errors import MLLMError
from mllm.hub.fingerprints import tensor_hash
from mllm.hub.identity import weights_of
from mllm.hub.verified import DamagedFile, read_verified, save_verified
from mllm.media.images import ImageSource, source_of
from mllm.media.tiles import Tiling, whole_images
from mllm.model import Model
from mllm.system import cache_dir, check_regular, remove_partial

FORMAT = 2  # of the shards and of their folder's key
LIMIT = 4 * 2**30  # bytes
ABANDONED = 24 * 3600  # seconds; what is written to a file for longer was left by a killed process
THREADS = min(8, os.cpu_count() or 1)  # that open images in the background


class FeatureStore:
    """Features of images, in memory and, given a folder, on disk.

    Args:
        model: the model whose `features` are cached.
        limit: the most bytes that are cached; further features are computed each time. None: no limit.
        chunk: the number of images, and of tiles, per forward pass of the encoder.
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
        """Return the features ``(U, P, D_vis)`` of images' tiles, in order, on the model's device."""
        return self._features(images, self._model.encoder.tiles, lambda opened: self._model.tiles_of([opened]))

    def whole(self, images: Sequence[Any]) -> Tensor:
        """Return features ``(I, P, D_vis)`` of whole images; further tiles of theirs are not encoded."""
        tiling = self._model.tiling
        if not isinstance(tiling, Tiling):
            return whole_images(self(images), self._model.layouts(images))
        return self._features(images, lambda opened: [tiling.whole(opened)], lambda _: 1, "whole/")

    def _features(
        self, images: Sequence[Any], cut: Callable[[Any], list[Any]], count: Callable[[Any], int], prefix: str = ""
    ) -> Tensor:
        """Return the features ``(U, P, D_vis)`` of the units that images are cut into.

        Args:
            images: in any accepted form.
            cut: returns what the encoder takes of an opened image.
            count: returns of how many units an opened image gets features.
            prefix: of the keys under which they are cached.
        """
        sources = [source_of(image) for image in images]
        keys = [prefix + self._model.encoder.key(source) for source in sources]
        features = {key: row for key in keys if (row := self._find(key)) is not None}
        missing = {key: source for key, source in zip(keys, sources, strict=True) if key not in features}
        names = list(missing)
        for start in range(0, len(names), self._chunk):
            chunk = names[start : start + self._chunk]
            opened = [self.opened(missing[key]) for key in chunk]
            tiles = [tile for image in opened for tile in cut(image)]
            rows = self._encoded(tiles).split(list(map(count, opened)))
            for key, row in zip(chunk, rows, strict=True):
                features[key] = row.flatten(0, 1)
                self._cache(key, features[key])
        whole = torch.cat([features[key].to(self._model.device) for key in keys])
        return whole.unflatten(0, (-1, self._model.encoder.num_patches))

    def _encoded(self, tiles: Sequence[Any]) -> Tensor:
        parts = [tiles[start : start + self._chunk] for start in range(0, len(tiles), self._chunk)]
        return torch.cat([self._model.encoded(part) for part in parts])

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
            save_verified(path, rows)
        except (OSError, SafetensorError) as error:
            raise MLLMError(
                f"The features could not be written to {self._folder}: {error}. Free some disk space, or set cache=off."
            ) from error
        self._stored |= dict.fromkeys(rows, path)
        self._new = []

    def _find(self, key: str) -> Tensor | None:
        """Return an image's features, or None if they are not cached."""
        if key not in self._cached and key in self._stored:
            self._read(self._stored[key])
        return self._cached.get(key)

    def _read(self, path: Path) -> None:
        """Read a shard from disk; a damaged one is discarded, with a warning, and its features are computed again."""
        try:
            rows, _ = read_verified(path)
            if not all(map(self._fits, rows.values())):
                raise DamagedFile("its features are of another shape or type")
        except (DamagedFile, OSError) as error:
            self._stored = {key: shard for key, shard in self._stored.items() if shard != path}
            _discard(path, error)
            return
        self._cached = {**rows, **self._cached}

    def _fits(self, row: Tensor) -> bool:
        """Whether a tensor has the shape of an image's features: ``(P, D_vis)``, or those of several tiles."""
        encoder = self._model.encoder
        tiles, rest = divmod(row.shape[0] if row.dim() == 2 else 0, encoder.num_patches)
        return (
            row.is_floating_point()
            and row.shape[-1:] == (encoder.dim,)
            and rest == 0
            and (tiles == 1 if encoder.tiling is None else tiles > 0)
        )

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
    folder = features_folder(model)
    if not folder.exists() and (former := _former_folder(model)).exists():
        warnings.warn(
            f"The features in {former} are of an earlier version, whose key was the encoder's weights and not its "
            "configuration: they are not used, and computed again. The folder can be deleted.",
            UserWarning,
            stacklevel=2,
        )
    return FeatureStore(model, limit=LIMIT if cache == "auto" else None, folder=folder)


def features_folder(model: Model) -> Path:
    """Return the cache folder for the features of this encoder: with its weights, configuration and settings."""
    return _folder_of(model, format=FORMAT, fingerprint=str(model.encoder.fingerprint))


def _former_folder(model: Model) -> Path:
    """Return the folder that earlier versions used, for any encoder with these weights and settings."""
    return _folder_of(model, weights=weights_of(str(model.encoder.fingerprint)))


def _folder_of(model: Model, **identity: Any) -> Path:
    encoder = model.encoder
    identity |= {
        "kind": type(encoder).__name__,
        "dtypes": sorted({str(parameter.dtype) for parameter in encoder.parameters()}),
        "settings": encoder.settings(),
    }
    if encoder.tiling is not None:
        identity["tiles"] = repr(encoder.tiling)
    if model.spec.trains("encoder"):
        identity["trained"] = tensor_hash(encoder)
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()
    return cache_dir() / "features" / digest[:32]


def _index(folder: Path) -> dict[str, Path]:
    """Return the shard of every key on disk; a damaged one is discarded, so its features are computed again."""
    shards: dict[str, Path] = {}
    remove_partial(folder, older_than=ABANDONED)
    for path in sorted(folder.glob("*.safetensors")):
        try:
            check_regular(path)
            with safe_open(path, framework="pt") as shard:
                shards |= dict.fromkeys(shard.keys(), path)
        except (SafetensorError, OSError) as error:
            _discard(path, error)
    return shards


def _discard(shard: Path, error: Exception) -> None:
    """Warn of a shard that cannot be used, and remove it, unless the system could not read it."""
    warnings.warn(
        f"The cached features in {shard} cannot be used: {error}. They are computed again.", UserWarning, stacklevel=2
    )
    if not isinstance(error, OSError):
        with contextlib.suppress(OSError):
            shard.unlink(missing_ok=True)
