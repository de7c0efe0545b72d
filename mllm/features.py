"""Frozen features, computed once: the encoder never changes, so an image seen again costs nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mllm.images import source_of


class FeatureStore:
    """Features of images in memory, by the content of the image.

    Args:
        model: whose `features` are kept.
        limit: bytes that are kept at most; what comes later is computed each time.
        chunk: images that go through the encoder at once.
    """

    def __init__(self, model: Any, *, limit: int = 4 * 2**30, chunk: int = 32) -> None:
        self._model, self._limit, self._chunk = model, limit, chunk
        self._kept: dict[str, Tensor] = {}
        self._bytes = 0

    def __call__(self, images: Sequence[Any]) -> Tensor:
        """Return features ``(I, P, D_vis)`` of pictures in any accepted form, in order."""
        sources = [source_of(image) for image in images]
        keys = [source.key() for source in sources]
        found = {key: self._kept[key] for key in keys if key in self._kept}
        missing = {key: source for key, source in zip(keys, sources, strict=True) if key not in found}
        names = list(missing)
        for start in range(0, len(names), self._chunk):
            chunk = names[start : start + self._chunk]
            for key, row in zip(chunk, self._model.features([missing[key] for key in chunk]), strict=True):
                found[key] = row
                self._keep(key, row)
        return torch.stack([found[key] for key in keys])

    def _keep(self, key: str, row: Tensor) -> None:
        size = row.numel() * row.element_size()
        if self._bytes + size <= self._limit:
            self._kept[key] = row.clone()  # a view would keep the whole chunk alive
            self._bytes += size
