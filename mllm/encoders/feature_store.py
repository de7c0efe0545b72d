"""Cache the features of a frozen encoder in memory and on disk, so that each image is encoded once.

In memory they are the host's: a GPU holds only the features of the batch that is computed. What is kept, and how it is
read and written, is `mllm.encoders.feature_rows`'s; in which folder, `mllm.encoders.feature_folder`'s. Images of the
next steps are opened in background threads.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mllm.config.messages import checked
from mllm.config.recipe import LIMIT, CacheSpec
from mllm.devices import dtype_of
from mllm.encoders.feature_folder import features_folder, warn_of_former_folder
from mllm.encoders.feature_rows import FeatureRows
from mllm.media.images import ImageSource, source_of
from mllm.media.tiles import Tiling, whole_images
from mllm.model import Model
from mllm.processes import processes

THREADS = min(8, os.cpu_count() or 1)  # that open images in the background
WHOLE = "whole/"  # before the key of an image of which the features as a whole are kept, and not those of its tiles


class FeatureStore:
    """Features of images, in memory and, given a folder, on disk.

    Args:
        model: the model whose `features` are cached.
        limit: the most bytes that are cached; further features are computed each time. None: no limit.
        memory: the most bytes of them in memory.
        chunk: the number of images, and of tiles, per forward pass of the encoder.
        folder: the folder of the shards on disk; None: memory only.
        dtype: that features are rounded to, before they are used and kept; None: they stay as the encoder returns them.
        writers: the number of processes that share the folder.
    """

    def __init__(
        self,
        model: Model,
        *,
        limit: int | None = LIMIT,
        memory: int = LIMIT,
        chunk: int = 8,
        folder: Path | None = None,
        dtype: torch.dtype | None = None,
        writers: int = 1,
    ) -> None:
        self._model, self._chunk, self._dtype = model, chunk, dtype
        self._rows = FeatureRows(folder, fits=self._fits, limit=limit, memory=memory, writers=writers)
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
        return self._features(images, lambda opened: [tiling.whole(opened)], lambda _: 1, WHOLE)

    def missing(self, images: Sequence[Any], *, whole: bool = False) -> list[Any]:
        """Return the images whose features are not cached, each once; ``whole``: those that `whole` returns."""
        prefix = WHOLE if whole and isinstance(self._model.tiling, Tiling) else ""
        keys = {prefix + self._model.encoder.key(source_of(image)): image for image in images}
        return [image for key, image in keys.items() if key not in self._rows]

    @property
    def full(self) -> bool:
        """Whether the limit was reached, so that features were not kept."""
        return self._rows.full

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
        features = {key: row for key in keys if (row := self._rows.get(key)) is not None}
        missing = {key: source for key, source in zip(keys, sources, strict=True) if key not in features}
        names = list(missing)
        for start in range(0, len(names), self._chunk):
            chunk = names[start : start + self._chunk]
            opened = [self.opened(missing[key]) for key in chunk]
            tiles = [tile for image in opened for tile in cut(image)]
            rows = self._encoded(tiles).split(list(map(count, opened)))
            for key, row in zip(chunk, rows, strict=True):
                features[key] = row.flatten(0, 1).to(self._dtype or row.dtype)
            self._rows.put({key: features[key] for key in chunk})
        whole = torch.cat([features[key].to(self._model.device) for key in keys])
        if self._dtype is not None:
            whole = whole.to(next((part.dtype for part in self._model.encoder.parameters()), whole.dtype))
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
        if not self._model.encoder_trains and encoder.key(source) in self._rows:
            return None
        return encoder.open(source)

    def flush(self) -> None:
        """Write new features to disk. Errors are those of `FeatureRows.flush`."""
        self._rows.flush()

    def _fits(self, row: Tensor) -> bool:
        """Whether a tensor has the shape of an image's features: ``(P, D_vis)``, or those of several tiles."""
        encoder = self._model.encoder
        tiles, rest = divmod(row.shape[0] if row.dim() == 2 else 0, encoder.num_patches)
        return (
            (row.is_floating_point() if self._dtype is None else row.dtype == self._dtype)
            and row.shape[-1:] == (encoder.dim,)
            and rest == 0
            and (tiles == 1 if encoder.tiling is None else tiles > 0)
        )


def open_store(model: Model, cache: CacheSpec | str) -> FeatureStore:
    """Return the feature store for a recipe's ``cache`` setting.

    Args:
        model: the model whose features are cached.
        cache: the setting, or its mode alone: ``auto`` caches up to 4 GiB in the user's cache folder, ``on`` without a
            limit; ``off`` computes the features each time.
    """
    spec = cache if isinstance(cache, CacheSpec) else checked(CacheSpec, cache)
    if spec.mode == "off" or not model.encoder.cacheable:
        return FeatureStore(model, limit=0)
    warn_of_former_folder(model)
    return FeatureStore(
        model,
        limit=spec.bytes,
        memory=spec.memory,
        folder=features_folder(model, spec.dtype),
        dtype=None if spec.dtype == "auto" else dtype_of(spec.dtype),
        writers=processes().num_processes,
    )
