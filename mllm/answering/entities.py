"""Name the entities that the scorer finds in an image, behind it in the prompt, as a caption's are in training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from mllm.model import Model
from mllm.prompts.entities import behind_last_image, named, vocabulary_of
from mllm.prompts.pieces import Piece, images_of

_VECTORS: WeakKeyDictionary[Model, tuple[tuple[str, ...], Tensor]] = WeakKeyDictionary()  # of vocabularies


def with_entities(model: Model, pieces: Any) -> Any:
    """Return a prompt with the entities of its last image named behind it, if the recipe has ``prompt.entities``."""
    spec = model.spec.prompt.entities
    images = images_of(pieces) if spec is not None and isinstance(pieces, Sequence) else []
    if spec is None or not images:
        return pieces
    words, vectors = _vocabulary(model)
    shares = (similarities(model, images[-1], vectors) / spec.temperature).softmax(-1)
    best = shares.argsort(descending=True)[: spec.top].tolist()
    return behind_last_image(pieces, named(spec, [words[n] for n in best if float(shares[n]) >= spec.threshold]))


@torch.no_grad()
def similarities(model: Model, image: Piece, vectors: Tensor) -> Tensor:
    """Return the cosines ``(N,)`` of an image and texts' vectors; of an image's several vectors the best one counts."""
    vector = model.scorer.embed_images([image])[0]
    return (vector.reshape(-1, vector.shape[-1]) @ vectors.T).amax(0).float()


def _vocabulary(model: Model) -> tuple[tuple[str, ...], Tensor]:
    """Return the words of the recipe's vocabulary and their vectors ``(N, D)``, which are computed once."""
    assert model.spec.prompt.entities is not None
    words = vocabulary_of(model.spec.prompt.entities)
    if model not in _VECTORS or _VECTORS[model][0] != words:
        _VECTORS[model] = words, model.scorer.embed_texts(words)
    return _VECTORS[model]
