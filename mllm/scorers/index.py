"""An index of images that a model's retrieval head searches: their vectors, in one file of safetensors.

Notable: the file knows whose vectors it holds (a hash of the head, the encoder and how it is set up), so it is refused
for another model from files alone, before a weight of that model is loaded. The search is exact, by faiss or torch.
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
from mllm.media.images import ImageFile
from mllm.model import Model
from mllm.outputs import ImagePart
from mllm.readout.tokens import heads_on_meta
from mllm.saving import read_saved
from mllm.scorers.retrieval import CHUNK, of_images
from mllm.system import write

FORMAT = "mllm-index-1"


class ImageIndex:
    """Images and their vectors.

    Args:
        vectors: ``(N, D)``, of length 1.
        paths: of the images.
        model: the hash of the model that made the vectors.

    Raises:
        MLLMError: no image.
    """

    def __init__(self, vectors: Tensor, paths: Sequence[str], model: str) -> None:
        if not paths:
            raise MLLMError("The index is empty: expected at least one image. Build it on a folder of pictures.")
        self.vectors, self.paths, self.model = vectors, list(paths), model

    def __len__(self) -> int:
        return len(self.paths)

    @classmethod
    def build(cls, model: Model, paths: Sequence[Path]) -> ImageIndex:
        """Return the index of picture files, made with a model's encoder and retrieval head.

        Raises:
            MLLMError: no picture, one that cannot be read, or a model without the head.
        """
        model.find(RetrievalHead)
        parts = [paths[start : start + CHUNK] for start in range(0, len(paths), CHUNK)]
        vectors = [of_images(model, [ImageFile(path) for path in part]) for part in parts]
        places = [str(path.resolve()) for path in paths]
        return cls(torch.cat(vectors) if vectors else torch.empty(0, 0), places, hash_of(model))

    @classmethod
    def load(cls, path: str | Path) -> ImageIndex:
        """Read an index.

        Raises:
            MLLMError: there is no index, or it is empty.
        """
        try:
            with safe_open(path, framework="pt") as file:
                about = file.metadata() or {}
                if about.get("format") != FORMAT:
                    raise MLLMError(f"{path} is no image index. Build one: mllm index build IMAGES OUT --run RUN.")
                return cls(file.get_tensor("vectors"), json.loads(about["paths"]), about["model"])
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise MLLMError(f"The index {path} cannot be read: {error}. Build it again.") from None

    def save(self, path: str | Path) -> None:
        """Write the index to a file.

        Raises:
            MLLMError: the file cannot be written.
        """
        about = {"format": FORMAT, "paths": json.dumps(self.paths), "model": self.model}
        try:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            write(Path(path), lambda file: save_file({"vectors": self.vectors.contiguous()}, file, about))
        except (OSError, SafetensorError) as error:
            raise MLLMError(f"The index could not be written to {path}: {error}. Give another place.") from error

    def check(self, model: str) -> None:
        """Hold the index against the hash of a model.

        Raises:
            MLLMError: another model made the vectors.
        """
        if self.model != model:
            raise MLLMError(
                f"The index was built with another model: it has {self.model[:16]}..., and this model is "
                f"{model[:16]}.... Build it again with this one: mllm index build IMAGES OUT --run RUN."
            )

    def search(self, queries: Tensor, count: int = 1) -> list[list[ImagePart]]:
        """Return for each of the queries ``(N, D)``, of length 1, its closest images by cosine, the closest first.

        Raises:
            MLLMError: a count below 1.
        """
        if count < 1:
            raise MLLMError(f"{count} images are asked for: expected 1 or more.")
        scores, places = self._closest(queries.float().cpu().contiguous(), min(count, len(self)))
        return [
            [self._part(place, score) for place, score in zip(*row, strict=True)]
            for row in zip(places.tolist(), scores.tolist(), strict=True)
        ]

    def _closest(self, queries: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Return the highest cosines ``(N, count)`` of queries and their places: by faiss, where it is installed."""
        if self._faiss is None:
            return (queries @ self.vectors.T).topk(count, dim=-1)
        scores, places = self._faiss.search(queries.numpy(), count)
        return torch.from_numpy(scores), torch.from_numpy(places)

    @functools.cached_property
    def _faiss(self) -> Any:
        """Return the vectors as faiss searches them: all of them, exactly (extra ``retrieval``)."""
        try:
            import faiss
        except ImportError:
            return None
        index = faiss.IndexFlatIP(self.vectors.shape[1])
        index.add(self.vectors.float().contiguous().numpy())
        return index

    def _part(self, place: int, score: float) -> ImagePart:
        path = self.paths[place]
        return ImagePart(ImageFile(Path(path)), id=str(place), score=score, source=path)


def opened(index: str | Path | ImageIndex, run: str | Path | None = None) -> ImageIndex:
    """Return an index; one for a run is held against it first, and nothing of the run is loaded.

    Raises:
        MLLMError: it cannot be read, is empty, or is another model's.
    """
    found = index if isinstance(index, ImageIndex) else ImageIndex.load(index)
    if run is not None:
        spec, fingerprints, tensors = read_saved(Path(run))
        heads = heads_on_meta(spec.heads).items()
        paths = [f"heads.{name}" for name, head in heads if isinstance(head, RetrievalHead)]
        found.check(_hash(tensors, paths, fingerprints.get("encoder", ""), spec.encoder))
    return found


def hash_of(model: Model) -> str:
    """Return what tells a model that made vectors of images from others."""
    paths = list(model.all(RetrievalHead))
    return _hash(model.trained_state(), paths, str(model.encoder.fingerprint), model.spec.encoder)


def _hash(tensors: Mapping[str, Tensor], heads: Sequence[str], fingerprint: str, encoder: Any) -> str:
    whole = hashlib.sha256(f"{fingerprint} {encoder.model_dump_json() if encoder else ''}".encode())
    for name, tensor in sorted(tensors.items()):
        if name.startswith((*(f"{path}." for path in heads), "encoder.")):
            whole.update(name.encode() + tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return whole.hexdigest()
