"""Decide whether to retrieve or to generate an image, by the language model's state at the decision head's token."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mllm.capabilities import DECISIONS, DecisionHead
from mllm.errors import MLLMError
from mllm.model import Model
from mllm.prompts.batch import collate
from mllm.prompts.pieces import Control, Piece, Target


def labeled_prompt(row: Sequence[Piece]) -> tuple[list[Piece], int]:
    """Return an example's prompt and the index of its label.

    Raises:
        MLLMError: the example does not end with one label.
    """
    *prompt, last = row
    label = last.text.strip() if isinstance(last, Target) else None
    if label not in DECISIONS or any(isinstance(piece, Target) for piece in prompt):
        raise MLLMError(
            f"The decision is learned from examples with one answer, of {', '.join(DECISIONS)}: got {label!r}. Check "
            "the stage's data."
        )
    return list(prompt), DECISIONS.index(label)


def states_at(model: Model, prompts: Sequence[Sequence[Piece]], visual: Tensor | None) -> Tensor:
    """Return the states ``(N, D_lm)`` at the decision head's token, appended to each prompt.

    Args:
        model: a model with a decision head.
        prompts: interleaved prompts.
        visual: the visual tokens ``(I, Q, D_lm)`` of their images.
    """
    token = Control(model.find(DecisionHead).tokens[0])
    batch = collate([model.encode([*prompt, token]) for prompt in prompts], model.lm.pad).to(model.device)
    states: Tensor = model.lm.hidden(model.embed(visual, batch), batch.mask)[:, -1]
    return states


@torch.no_grad()
def decide(model: Model, states: Tensor) -> list[str]:
    """Return the decision head's prediction for each of the states ``(N, D_lm)`` at its token.

    Raises:
        MLLMError: the model has no decision head.
    """
    head = model.find(DecisionHead)
    return [head.labels[index] for index in head(states).argmax(-1).tolist()]
