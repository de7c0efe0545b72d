"""Losses over one batch, each a class: what it needs, how much it counts, and its sum.

Notable: a sum and a count, not a mean: batches that are accumulated, or spread over processes, weigh each target the
same.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mllm.errors import MLLMError
from mllm.prompt import IGNORED, Batch, Piece, Target, images_of
from mllm.registry import lookup
from mllm.spec import ObjectiveSpec


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


def objectives_of(specs: Sequence[ObjectiveSpec]) -> list[Objective]:
    """Return objectives made with their options.

    Raises:
        MLLMError: an unknown one, or options that it does not take.
    """
    found = []
    for spec in specs:
        cls = lookup("objectives", spec.type)
        try:
            inspect.signature(cls).bind(**spec.options())
        except TypeError as error:
            raise MLLMError(f"The objective {spec.type} does not take these arguments: {error}.") from None
        found.append(cls(**spec.options()))
    return found


class Caption:
    """The negative log-likelihood of the target tokens: captions, answers, what an assistant says."""

    needs = ("lm",)
    apart = True  # its sum is of each example's own, whichever stand beside it

    def count(self, rows: Sequence[Sequence[Piece]], batch: Batch | None) -> int:
        """Return the number of target tokens."""
        assert batch is not None
        return int(torch.count_nonzero(batch.labels[:, 1:] != IGNORED))

    def __call__(self, inputs: Inputs) -> Tensor:
        """Return the sum over target tokens."""
        model, batch = inputs.model, inputs.batch
        assert batch is not None
        losses: Tensor = model.lm.losses(model.embed(inputs.visual, batch), batch.mask, batch.labels)  # (N,)
        return losses.sum()


class Contrastive:
    """Pictures and texts of a batch find each other among all of it (InfoNCE, both directions; arXiv:2103.00020).

    A picture's vector is the mean of its visual tokens, a text's that of the language model's ``sentences``, both of
    length 1. Rows with the same text are all right for each other (UniCL, arXiv:2204.03610). Texts of other processes
    are not looked at.

    Args:
        temperature: what the cosines are divided by.
    """

    needs = ("lm.sentences", "connector")

    def __init__(self, temperature: float = 0.05) -> None:
        if temperature <= 0:
            raise MLLMError(f"The objective contrastive has temperature {temperature}: expected a number above 0.")
        self._temperature = temperature

    def count(self, rows: Sequence[Sequence[Piece]], batch: Batch | None) -> int:
        """Return the number of rows."""
        return len(rows)

    def __call__(self, inputs: Inputs) -> Tensor:
        """Return the sum over rows, the two directions' mean."""
        texts = [_told(row) for row in inputs.rows]
        assert inputs.visual is not None
        seen = nn.functional.normalize(inputs.visual.float().mean(1), dim=-1)  # (N, D_lm)
        cosines = seen @ inputs.model.lm.sentences(texts).float().T / self._temperature  # (N, N)
        same = torch.tensor([[one == other for other in texts] for one in texts], device=cosines.device)
        right = same / same.sum(1, keepdim=True)  # symmetric, so it holds for both directions
        losses = [nn.functional.cross_entropy(each, right, reduction="sum") for each in (cosines, cosines.T)]
        return torch.stack(losses).mean()


def _told(row: Sequence[Piece]) -> str:
    """Return what is learnt to be said of a row's one picture."""
    said = "".join(piece.text for piece in row if isinstance(piece, Target)).strip()
    if len(images_of(row)) != 1 or not said:
        raise MLLMError(
            f"The objective contrastive needs one picture and a text in each example; here are {len(images_of(row))} "
            f"pictures and the text {said!r}. Give captions of single pictures."
        )
    return said
