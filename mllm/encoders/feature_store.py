"""Cache the features of a frozen encoder in memory and on disk, so that each image is encoded once.

In memory they are the host's: a GPU holds only the features of the batch that is computed. What is kept, and how it is
read and written, is `mllm.encoders.feature_rows`'s; in which folder, `mllm.encoders.feature_folder`'s. Images are
opened, cut and prepared in threads, or their features are read, for the next step while this one is computed; the
encoder gets images as bytes.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mllm.config.messages import checked
from mllm.config.recipe import LIMIT, CacheSpec
from mllm.devices import dtype_of, moved, pinned
from mllm.encoders.feature_folder import features_folder, warn_of_former_folder
from mllm.encoders.feature_rows import FeatureRows
from mllm.encoders.texts import Units, features_of, units_of
from mllm.media.images import ImageSource, source_of
from mllm.media.tiles import Tiling, whole_images
from mllm.model import Model
from mllm.processes import processes

THREADS = min(16, os.cpu_count() or 1)  # that open and prepare images in the background
CHUNK = 8  # images, and tiles, per forward pass of the encoder on a CPU
SHARE = 32  # of a GPU's memory, the part that a chunk's activations may take
WHOLE = "whole/"  # before the key of an image of which the features as a whole are kept, and not those of its tiles


class Prepared(NamedTuple):
    """An image, prepared in a thread.

    Args:
        key: of its features.
        units: what the encoder takes of it; None where its features are cached.
        row: its cached features ``(u P, D_vis)``.
    """

    key: str
    units: Units | None
    row: Tensor | None = None


class FeatureStore:
    """Features of images, in memory and, given a folder, on disk.

    Args:
        model: the model whose `features` are cached.
        limit: the most bytes that are cached; further features are computed each time. None: no limit.
        memory: the most bytes of them in memory.
        chunk: the number of images, and of tiles, per forward pass of the encoder; None: by the device.
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
        chunk: int | None = None,
        folder: Path | None = None,
        dtype: torch.dtype | None = None,
        writers: int = 1,
    ) -> None:
        self._model, self._chunk, self._dtype, self._kept = model, chunk or chunk_for(model), dtype, limit != 0
        self._rows = FeatureRows(folder, fits=self._fits, limit=limit, memory=memory, writers=writers)
        self._expected: list[dict[Any, Future[Prepared]]] = [{}, {}]  # for this step and for the next
        self._threads = ThreadPoolExecutor(THREADS)

    def __call__(self, images: Sequence[Any]) -> Tensor:
        """Return the features ``(U, P, D_vis)`` of images' tiles, in order, on the model's device."""
        sources = [source_of(image) for image in images]
        return self._features(sources, self._requested(sources))

    def whole(self, images: Sequence[Any]) -> Tensor:
        """Return features ``(I, P, D_vis)`` of whole images; further tiles of theirs are not encoded."""
        tiling = self._model.tiling
        if not isinstance(tiling, Tiling):
            return whole_images(self(images), self._model.layouts(images))
        sources = [source_of(image) for image in images]
        prepare = partial(self._prepare, cut=lambda opened: [tiling.whole(opened)], prefix=WHOLE)
        distinct = list(dict.fromkeys(sources))
        return self._features(sources, dict(zip(distinct, self._threads.map(prepare, distinct), strict=True)))

    def missing(self, images: Sequence[Any], *, whole: bool = False) -> list[Any]:
        """Return the images whose features are not cached, each once; ``whole``: those that `whole` returns."""
        prefix = WHOLE if whole and isinstance(self._model.tiling, Tiling) else ""
        keys = {prefix + self._model.encoder.key(source_of(image)): image for image in images}
        return [image for key, image in keys.items() if key not in self._rows]

    @property
    def full(self) -> bool:
        """Whether the limit was reached, so that features were not kept."""
        return self._rows.full

    def units(self, images: Sequence[Any]) -> Tensor:
        """Return what the encoder takes of images ``(U, ...)``, on the model's device.

        Raises:
            MLLMError: an image cannot be read.
        """
        sources = [source_of(image) for image in images]
        prepared = self._requested(sources)
        encoder, units = self._model.encoder, [prepared[source].units for source in sources]
        tensors = [unit if isinstance(unit, Tensor) else encoder.preprocess([unit]) for unit in units]
        return torch.cat([moved(tensor, self._model.device) for tensor in tensors])

    def _features(self, sources: Sequence[ImageSource], prepared: Mapping[ImageSource, Prepared]) -> Tensor:
        """Return the features ``(U, P, D_vis)`` of the units of images.

        Args:
            sources: the images.
            prepared: each of them; the features of one may have been cached since.
        """
        features: dict[str, Tensor] = {}
        missing: dict[str, Units] = {}
        keys = [prepared[source].key for source in sources]
        for key, units, row in map(prepared.__getitem__, dict.fromkeys(sources)):
            row = self._rows.get(key) if row is None else row
            if row is not None:
                features[key] = row
            elif units is not None:
                missing[key] = units
        names = list(missing)
        for start in range(0, len(names), self._chunk):
            chunk = names[start : start + self._chunk]
            for key, row in zip(chunk, self._encoded([missing[key] for key in chunk]), strict=True):
                features[key] = row.flatten(0, 1).to(self._dtype or row.dtype)
            if self._kept:
                self._rows.put({key: features[key] for key in chunk})
        whole = torch.cat([features[key].to(self._model.device, non_blocking=True) for key in keys])
        if self._dtype is not None:
            whole = whole.to(next((part.dtype for part in self._model.encoder.parameters()), whole.dtype))
        return whole.unflatten(0, (-1, self._model.encoder.num_patches))

    def _encoded(self, images: Sequence[Units]) -> list[Tensor]:
        """Return the features ``(u, P, D_vis)`` of each image."""
        model = self._model
        counts = [len(image) if isinstance(image, Tensor) else 1 for image in images]
        with torch.no_grad():
            return list(features_of(model.encoder, images, model.device, self._chunk).split(counts))

    def expect(self, images: Sequence[Any]) -> None:
        """Start to open and prepare images that will be requested, except those whose features are cached.

        Images of the call before the last that were not requested are dropped.
        """
        sources = {image for image in images if isinstance(image, ImageSource)} - self._expected[1].keys()
        self._expected = [self._expected[1], {source: self._submitted(source) for source in sources}]

    def _requested(self, sources: Sequence[ImageSource]) -> dict[ImageSource, Prepared]:
        """Return images prepared: those that were not expected are prepared now.

        Raises:
            MLLMError: an image cannot be read.
        """
        futures: dict[ImageSource, Future[Prepared]] = {}
        for source in dict.fromkeys(sources):
            waiting = [step.pop(source) for step in self._expected if source in step]
            futures[source] = waiting[0] if waiting else self._submitted(source)
        return {source: future.result() for source, future in futures.items()}

    def _submitted(self, source: ImageSource) -> Future[Prepared]:
        return self._threads.submit(self._prepare, source)

    def _prepare(
        self, source: ImageSource, *, cut: Callable[[Any], list[Any]] | None = None, prefix: str = ""
    ) -> Prepared:
        """Read an image's features where they are cached; else open it, cut it, and prepare its tiles."""
        encoder = self._model.encoder
        cut = cut or encoder.tiles
        key = prefix + encoder.key(source)
        if (row := self._rows.get(key)) is not None:
            return Prepared(key, None, row)
        units = units_of(encoder, cut(encoder.open(source)))
        return Prepared(key, pinned(units, self._model.device) if isinstance(units, Tensor) else units)

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


def chunk_for(model: Model) -> int:
    """Return how many images the encoder takes at once: on a GPU as many as its memory allows, in powers of two.

    The same card always gives the same number, since the last bits of features may depend on it.
    """
    weights = None if model.encoder is None else next(model.encoder.parameters(), None)
    if model.device.type != "cuda" or weights is None:
        return CHUNK
    block = 32 * model.encoder.num_patches * model.encoder.dim * weights.element_size()  # its hidden layer included
    memory = torch.cuda.get_device_properties(model.device).total_memory // SHARE
    return int(max(CHUNK, min(256, 2 ** int(math.log2(max(1, memory // block))))))


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
