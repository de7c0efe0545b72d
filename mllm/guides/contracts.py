"""Define what guides can do, what asks them, and what a reward is: the types that a stage's guides are searched by.

An objective or a closed form asks the guides of its stage, by kind and perhaps by name (`Ask`). The first line of each
kind says how a recipe names such a guide; it stands in the message where there is none.

Shapes: I images, N texts or samples, Q vectors of an image, D their width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

from torch import Tensor

from mllm.prompts.pieces import Piece


@runtime_checkable
class EmbedsImages(Protocol):
    """A guide that embeds images: ``guides: {NAME: {type: run, model: RUN}}``, or a scorer, such as a dual encoder.

    Its vectors have the width ``dim``.
    """

    @property
    def dim(self) -> int:
        """Return D."""

    def embed_images(self, images: Sequence[Any]) -> Tensor:
        """Return vectors ``(I, D)``, or ``(I, Q, D)``."""


@runtime_checkable
class EmbedsTexts(Protocol):
    """A guide that embeds texts: ``guides: {NAME: {type: dual-encoder, model: ...}}``."""

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Return vectors ``(N, D)``."""


class Ask(NamedTuple):
    """What is asked of a stage's guides: one that is of a kind, and its name, unless it is the only one."""

    kinds: tuple[type, ...]  # each will do
    name: str | None = None


@runtime_checkable
class AsksGuides(Protocol):
    """An objective, a reward or a closed form that asks guides: ``objectives: [{type: align, guide: NAME}]``."""

    @property
    def asks(self) -> Sequence[Ask]:
        """Return what it asks, of frozen models that `mllm.model.Model.guide` returns."""


@runtime_checkable
class ReadsNoAnswer(Protocol):
    """An objective, a reward or a fit that items without answers serve, too: ``objectives: [{type: align}]``."""

    @property
    def reads_no_answer(self) -> bool:
        """Whether it is so with its options."""


@runtime_checkable
class FindsProblems(Protocol):
    """An objective that a model, or its guides, may not suit: ``objectives: [{type: align}]``."""

    def problems(self, model: Any) -> list[str]:
        """Return why a stage cannot train it; called on the meta device, too, with the guides that it asks opened."""


@dataclass(frozen=True)
class Samples:
    """Answers that the model sampled, N of them, those to one prompt one after another.

    Attributes:
        model: the model, which also returns guides (`mllm.model.Model.guide`).
        texts: the sampled answers.
        prompts: the interleaved prompt of each.
        references: the answers that the data has for each; none where items have no answers.
    """

    model: Any
    texts: Sequence[str]
    prompts: Sequence[Sequence[Piece]]
    references: Sequence[Sequence[str]]


@runtime_checkable
class Reward(Protocol):
    """A reward of sampled answers: ``objectives: [{type: reward, of: [{type: closeness}]}]``.

    One that asks guides is also an `AsksGuides`, one that reads no references a `ReadsNoAnswer`.
    """

    @property
    def per_example(self) -> bool:
        """Whether a sample's reward does not depend on those to other prompts, so that a batch may be divided."""

    def __call__(self, samples: Samples) -> Tensor:
        """Return the reward ``(N,)`` of each sample."""
