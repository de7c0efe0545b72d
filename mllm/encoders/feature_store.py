"""Frozen features, computed once: the encoder never changes, so an image seen again costs nothing.

Notable: what is kept on disk stands under a hash of everything that decides a feature (the encoder's weights, layer,
selection, resolution and processor, and the type of its numbers), and in there by the picture's content. When any of it
changes, another place is looked in: nothing stale can be found. Pictures that will be asked for are opened in threads
meanwhile.
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
THREADS = min(8, os.cpu_count() or 1)  # that open pictures


class FeatureStore:
    """Features of images, in memory and, given a folder, on disk.

    Args:
        model: whose `features` are kept.
        limit: bytes that are kept at most; what comes later is computed each time. None: no limit.
        chunk: images that go through the encoder at once.
        folder: where shards are read from and written to; None: memory only.
    """

    def __init__(self, model: Model, *, limit: int | None = LIMIT, chunk: int = 8, folder: Path | None = None) -> None:
        self._model, self._limit, self._chunk, self._folder = model, limit, chunk, folder
        self._kept: dict[str, Tensor] = {}
        self._new: list[str] = []  # kept, and not on disk yet
        self._stored = _index(folder) if folder else {}
        self._bytes = sum(path.stat().st_size for path in set(self._stored.values()))
        self._begun: list[dict[Any, Future[Any]]] = [{}, {}]  # pictures that are opened: for this step, for the next
        self._threads = ThreadPoolExecutor(THREADS)

    def __call__(self, images: Sequence[Any]) -> Tensor:
        """Return features ``(I, P, D_vis)`` of pictures in any accepted form, in order."""
        sources = [source_of(image) for image in images]
        keys = [self._model.encoder.key(source) for source in sources]
        found = {key: self._find(key) for key in keys if key in self._kept or key in self._stored}
        missing = {key: source for key, source in zip(keys, sources, strict=True) if key not in found}
        names = list(missing)
        for start in range(0, len(names), self._chunk):
            chunk = names[start : start + self._chunk]
            pictures = [self.opened(missing[key]) for key in chunk]
            for key, row in zip(chunk, self._model.features(pictures), strict=True):
                found[key] = row
                self._keep(key, row)
        return torch.stack([found[key] for key in keys])

    def expect(self, images: Sequence[Any]) -> None:
        """Begin to open pictures that will be asked for, but for those whose features are kept.

        What was expected two calls ago and not asked for is let go.
        """
        sources = {image for image in images if isinstance(image, ImageSource)} - self._begun[1].keys()
        self._begun = [self._begun[1], {source: self._threads.submit(self._awaited, source) for source in sources}]

    def opened(self, image: Any) -> Any:
        """Return a picture as the encoder's `preprocess` takes it.

        Raises:
            MLLMError: it cannot be read.
        """
        begun = [now.pop(image) for now in self._begun if isinstance(image, ImageSource) and image in now]
        found = begun[0].result() if begun else None
        return self._model.encoder.open(image) if found is None else found

    def _awaited(self, source: ImageSource) -> Any:
        """Return an opened picture, or None where its features are kept."""
        encoder = self._model.encoder
        if not self._model.encoder_trains:
            key = encoder.key(source)
            if key in self._kept or key in self._stored:
                return None
        return encoder.open(source)

    def flush(self) -> None:
        """Write what is new to a shard on disk; a kill while it is written leaves nothing of it.

        Raises:
            MLLMError: the folder cannot be written.
        """
        if self._folder is None or not self._new:
            return
        rows = {key: self._kept[key].cpu().contiguous() for key in self._new}
        path = self._folder / f"{hashlib.sha256(''.join(rows).encode()).hexdigest()[:16]}.safetensors"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            write(path, lambda file: save_file(rows, file))
        except (OSError, SafetensorError) as error:
            raise MLLMError(
                f"The features could not be kept in {self._folder}: {error}. Free some room, or say cache=off."
            ) from error
        self._stored |= dict.fromkeys(rows, path)
        self._new = []

    def _find(self, key: str) -> Tensor:
        if key not in self._kept:
            with safe_open(self._stored[key], framework="pt", device=str(self._model.device)) as shard:
                for name in shard.keys():  # noqa: SIM118  # it is no mapping
                    self._kept.setdefault(name, shard.get_tensor(name))
        return self._kept[key]

    def _keep(self, key: str, row: Tensor) -> None:
        size = row.numel() * row.element_size()
        if self._limit is None or self._bytes + size <= self._limit:
            self._kept[key] = row.clone()  # a view would keep the whole chunk alive
            self._new.append(key)
            self._bytes += size


def open_store(model: Model, cache: str) -> FeatureStore:
    """Return the store that a recipe's ``cache`` asks for.

    Args:
        model: the assembly.
        cache: ``auto`` keeps up to 4 GiB in memory and in the user's cache folder, ``on`` without a limit, ``off``
            computes every feature each time it is needed.
    """
    if cache == "off" or not model.encoder.cacheable:
        return FeatureStore(model, limit=0)
    return FeatureStore(model, limit=LIMIT if cache == "auto" else None, folder=place_of(model))


def place_of(model: Model) -> Path:
    """Return the folder of features that this very encoder, so set up, has made."""
    encoder = model.encoder
    decides = {
        "weights": encoder.fingerprint,
        "kind": type(encoder).__name__,
        "dtypes": sorted({str(parameter.dtype) for parameter in encoder.parameters()}),
        "settings": encoder.settings(),
    }
    if model.spec.trains("encoder"):
        decides["trained"] = tensor_hash(encoder)
    digest = hashlib.sha256(json.dumps(decides, sort_keys=True, default=str).encode()).hexdigest()
    return cache_dir() / "features" / digest[:32]


def _index(folder: Path) -> dict[str, Path]:
    """Return key -> shard of all that is on disk; a shard that is damaged is passed over, and computed again."""
    found: dict[str, Path] = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as shard:
                found |= dict.fromkeys(shard.keys(), path)
        except (SafetensorError, OSError):
            continue
    return found
