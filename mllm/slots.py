"""What every objective is: a loss over one batch, what it needs and what it counts. The kinds are in ``objectives/``.

Notable: a sum and a count, not a mean: batches that are accumulated, or spread over processes, weigh each target the
same.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from mllm.prompts.batch import Batch
from mllm.prompts.pieces import Piece


class Inputs:
    """A batch as objectives see it.

    Args:
        model: the assembly.
        rows: the training examples, as interleaved prompts.
        features: ``(I, P, D_vis)`` of their images in reading order, or None where there are none.
        batch: the rows as ids, padded; None where the model has no language model.
    """

    def __init__(self, model: Any, rows: Sequence[Sequence[Piece]], features: Tensor | None, batch: Batch | None):
        self.model, self.rows, self.features, self.batch = model, rows, features, batch
        self.shared: dict[str, Any] = {}  # what one objective made and another needs too

    @cached_property
    def visual(self) -> Tensor | None:
        """The connector's visual tokens ``(I, Q, D_lm)``, made once for all objectives."""
        return None if self.features is None else self.model.connector(self.features)


class Objective(Protocol):
    """What a stage sums."""

    @property
    def needs(self) -> Sequence[str]:
        """Return dotted names of what the model must have (``lm``, ``connector.joint``, ``heads.retrieval``)."""

    def count(self, rows: Sequence[Sequence[Piece]], batch: Batch | None) -> int:
        """Return by how much the sum is to be divided; called before the model computes anything."""

    def __call__(self, inputs: Inputs) -> Tensor:
        """Return the summed loss, a scalar."""


class ImageDecoder(Protocol):
    """A frozen model that makes images; its class says by ``shape(**options)`` what it takes, and loads nothing.

    One that was trained to take noise off may offer ``denoise(images, conditions)``, its own loss ``(N,)``.
    """

    condition: tuple[int, int]  # L, W

    @property
    def label(self) -> str:
        """Return what it is called in an answer."""

    def encode(self, texts: Sequence[str]) -> Tensor:
        """Return its own text encoder's conditions ``(N, L, W)``."""

    def draw(self, conditions: Tensor, seeds: Sequence[int]) -> list[Any]:
        """Return a PIL image for each of the conditions ``(N, L, W)``, drawn with its seed."""


@runtime_checkable
class MatchesPairs(Protocol):
    """A scorer that also reads an image and a text together, and so reranks the first candidates of a ranking."""

    rerank: int  # how many of the first candidates it reads pair by pair

    def matches(self, images: Sequence[Any], texts: Sequence[str]) -> Tensor:
        """Return the log-odds ``(N,)`` that each of N images and the text at the same index belong together."""


@runtime_checkable
class ReadsPrompts(Protocol):
    """A scorer that also embeds interleaved prompts of texts and images."""

    def embed_prompts(self, prompts: Sequence[Sequence[Piece]]) -> Tensor:
        """Return vectors ``(N, D)`` of length 1 of N prompts."""
