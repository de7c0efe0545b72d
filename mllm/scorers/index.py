"""Build, save and search an index of images: the vectors of a model's retrieval head, in one safetensors file.

The file contains a hash of the model (head, encoder and encoder settings), so an index of another model is refused
before any weight of the model is loaded. The search is exact, by faiss or torch.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mllm.capabilities import RetrievalHead
from mllm.errors import MLLMError
from mllm.hub.identity import differing, joined, weights_of
from mllm.media.images import ImageFile
from mllm.model import Model
from mllm.outputs import ImagePart
from mllm.readout.tokens import heads_on_meta
from mllm.saving import read_saved
from mllm.scorers.retrieval import CHUNK, embed_images
from mllm.system import check_regular, write

FORMAT = "mllm-index-1"


class ImageIndex:
    """The paths and vectors of images.

    Args:
        vectors: ``(N, D)``, of length 1.
        paths: the images' files.
        model: the hash of the model that computed the vectors.

    Raises:
        MLLMError: there is no image.
    """

    def __init__(self, vectors: Tensor, paths: Sequence[str], model: str) -> None:
        if not paths:
            raise MLLMError("The index is empty: expected at least one image. Build it from a folder of images.")
        self.vectors, self.paths, self.model = vectors, list(paths), model

    def __len__(self) -> int:
        return len(self.paths)

    @classmethod
    def build(cls, model: Model, paths: Sequence[Path]) -> ImageIndex:
        """Return the index of image files, computed with a model's encoder and retrieval head.

        Raises:
            MLLMError: there is no image, one cannot be read, or the model has no retrieval head.
        """
        model.find(RetrievalHead)
        chunks = [paths[start : start + CHUNK] for start in range(0, len(paths), CHUNK)]
        vectors = [embed_images(model, [ImageFile(path) for path in chunk]) for chunk in chunks]
        absolute = [str(path.resolve()) for path in paths]
        return cls(torch.cat(vectors) if vectors else torch.empty(0, 0), absolute, hash_of(model))

    @classmethod
    def load(cls, path: str | Path) -> ImageIndex:
        """Read an index.

        Raises:
            MLLMError: the file is no index, cannot be read, or is empty.
        """
        try:
            check_regular(path)
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != FORMAT:
                    raise MLLMError(f"{path} is not an image index. Build one: mllm index build IMAGES OUT --run RUN.")
                return cls(file.get_tensor("vectors"), json.loads(metadata["paths"]), metadata["model"])
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise MLLMError(f"The index {path} cannot be read: {error}. Build it again.") from None

    def save(self, path: str | Path) -> None:
        """Write the index to a file.

        Raises:
            MLLMError: the file cannot be written.
        """
        metadata = {"format": FORMAT, "paths": json.dumps(self.paths), "model": self.model}
        try:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            write(Path(path), lambda file: save_file({"vectors": self.vectors.contiguous()}, file, metadata))
        except (OSError, SafetensorError) as error:
            raise MLLMError(f"The index could not be written to {path}: {error}. Give another path.") from error

    def check(self, model: str) -> None:
        """Compare the index's model hash with that of a model.

        Raises:
            MLLMError: another model computed the vectors.
        """
        for expected, present in differing(self.model, model).values():
            raise MLLMError(
                f"The index was built with another model: its hash is {expected[:16]}..., and this model's is "
                f"{present[:16]}.... Build it again with this model: mllm index build IMAGES OUT --run RUN."
            )

    def search(self, queries: Tensor, count: int = 1) -> list[list[ImagePart]]:
        """Return the closest images by cosine for each of the queries ``(N, D)`` of length 1, in descending order.

        Raises:
            MLLMError: a count below 1.
        """
        if count < 1:
            raise MLLMError(f"{count} images were requested: expected 1 or more. Raise the count.")
        scores, indices = self._closest(queries.float().cpu().contiguous(), min(count, len(self)))
        return [
            [self._part(index, score) for index, score in zip(*row, strict=True)]
            for row in zip(indices.tolist(), scores.tolist(), strict=True)
        ]

    def _closest(self, queries: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Return the highest cosines ``(N, count)`` and the images' indices; by faiss, where it is installed."""
        if self._faiss is None:
            return (queries @ self.vectors.T).topk(count, dim=-1)
        scores, indices = self._faiss.search(queries.numpy(), count)
        return torch.from_numpy(scores), torch.from_numpy(indices)

    @functools.cached_property
    def _faiss(self) -> Any:
        """Return a flat (exact) faiss index of the vectors; None where faiss (extra ``retrieval``) is missing."""
        try:
            import faiss
        except ImportError:
            return None
        index = faiss.IndexFlatIP(self.vectors.shape[1])
        index.add(self.vectors.float().contiguous().numpy())
        return index

    def _part(self, index: int, score: float) -> ImagePart:
        path = self.paths[index]
        return ImagePart(ImageFile(Path(path)), id=str(index), score=score, source=path)


def opened(index: str | Path | ImageIndex, run: str | Path | None = None) -> ImageIndex:
    """Return a loaded index; with a run, after comparing their hashes, for which no model is built.

    Raises:
        MLLMError: the index cannot be read, is empty, or was built with another model.
    """
    loaded = index if isinstance(index, ImageIndex) else ImageIndex.load(index)
    if run is not None:
        spec, fingerprints, tensors = read_saved(Path(run))
        heads = heads_on_meta(spec.heads).items()
        paths = [f"heads.{name}" for name, head in heads if isinstance(head, RetrievalHead)]
        loaded.check(_hash(tensors, paths, fingerprints.get("encoder", ""), spec.encoder))
    return loaded


def hash_of(model: Model) -> str:
    """Return a hash of everything that determines a model's image vectors."""
    paths = list(model.find_all(RetrievalHead))
    return _hash(model.trained_state(), paths, str(model.encoder.fingerprint), model.spec.encoder)


def _hash(tensors: Mapping[str, Tensor], heads: Sequence[str], fingerprint: str, encoder: Any) -> str:
    digest = hashlib.sha256(f"{weights_of(fingerprint)} {encoder.model_dump_json() if encoder else ''}".encode())
    for name, tensor in sorted(tensors.items()):
        if name.startswith((*(f"{path}." for path in heads), "encoder.")):
            digest.update(name.encode() + tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return joined(digest.hexdigest(), [fingerprint])
