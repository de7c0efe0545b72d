"""The decision between retrieving and generating an image, read at the head's token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mllm.errors import MLLMError
from mllm.prompts.batch import collate
from mllm.prompts.pieces import Control, Piece, Target
from mllm.readout.tokens import known_tokens

HEAD = "decision"


LABELS = ("retrieve", "generate")


def labelled(row: Sequence[Piece]) -> tuple[list[Piece], int]:
    """Return an example's prompt, and the place of its label.

    Raises:
        MLLMError: it does not end with one label.
    """
    *prompt, last = row
    label = last.text.strip() if isinstance(last, Target) else None
    if label not in LABELS or any(isinstance(piece, Target) for piece in prompt):
        raise MLLMError(f"The decision is learnt from examples with one answer, of {', '.join(LABELS)}: got {label!r}.")
    return list(prompt), LABELS.index(label)


def states_at(model: Any, prompts: Sequence[Sequence[Piece]], visual: Tensor | None) -> Tensor:
    """Return the states ``(N, D_lm)`` at the head's token, put behind each prompt.

    Args:
        model: the assembly.
        prompts: interleaved.
        visual: the visual tokens ``(I, Q, D_lm)`` of their images.
    """
    known_tokens(model)
    token = Control(model.heads[HEAD].token)
    batch = collate([model.encode([*prompt, token]) for prompt in prompts], model.lm.pad).to(model.device)
    states: Tensor = model.lm.hidden(model.embed(visual, batch), batch.mask)[:, -1]
    return states


@torch.no_grad()
def decided(model: Any, states: Tensor) -> list[str]:
    """Return the label of each of the states ``(N, D_lm)`` at the head's token.

    Raises:
        MLLMError: the model has no such head.
    """
    if HEAD not in model.heads:
        raise MLLMError("This model has no decision head. Add heads: [{type: decision}], and train it on labels.")
    return [LABELS[place] for place in model.heads[HEAD](states).argmax(-1).tolist()]
