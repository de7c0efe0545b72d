"""Start a batch from the KV cache of the text that its prompts begin with: a recipe's system prompt and examples.

Notable: which ids are shared depends on the recipe and the batch alone, never on earlier calls. An image ends the
shared text, since only texts are known by their ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor

from mllm.lms.decoding import Decoding
from mllm.lms.generation import exceeds
from mllm.lms.shared_prefix import can_shift, shifted
from mllm.model import Model
from mllm.prompts.batch import Batch, encode
from mllm.prompts.formatting import preamble
from mllm.prompts.pieces import is_image, shared_length

SHORTEST = 16  # ids, of what is computed once for all batches
SAVED = 256  # ids in all rows but one, of what a batch alone shares


@torch.no_grad()
def started(model: Model, batch: Batch, decodings: Sequence[Decoding] = ()) -> Any:
    """Return the KV cache of a batch's first positions, to be extended; None: nothing is shared, or it cannot be.

    Args:
        model: the model.
        batch: its prompts.
        decodings: of the answers that follow, if any.
    """
    lm, longest = model.lm, max((decoding.max_new_tokens or 0 for decoding in decodings), default=0)
    ids, is_recipes = _shared(model, batch)
    if not ids or lm.exceeds_window(len(ids) + 1) or exceeds(lm, batch.mask.shape[1] + longest):
        return None
    if not lm.runner.shares_prefix:  # it is probed only where there is something to share
        return None

    def prefill() -> Any:
        embeds = lm.embed(torch.tensor([ids], device=model.device))
        return lm.prefill(embeds, batch.mask.new_ones(embeds.shape[:2]))[0]

    cache = model.prefixes.of(ids, model, prefill) if is_recipes else prefill()
    return shifted(cache, (1 - batch.mask).sum(1)) if can_shift(cache, len(ids)) else None


@torch.no_grad()
def prefilled(model: Model, embeds: Any, batch: Batch) -> tuple[Any, Tensor]:
    """Return the KV cache of a batch, and the next token's logits ``(B, V)``; what its prompts share is computed once.

    Args:
        model: the model.
        embeds: ``(B, T, D_lm)``, see `mllm.model.Model.embed`.
        batch: its prompts.
    """
    cache = started(model, batch)
    if cache is None:
        cache, logits = model.lm.prefill(embeds, batch.mask)
        return cache, logits
    new = embeds[:, model.lm.length(cache) :]
    last = torch.tensor([new.shape[1] - 1], device=new.device)
    return cache, model.lm.logits(new, batch.mask, last, cache)[:, -1]


def _shared(model: Model, batch: Batch) -> tuple[list[int], bool]:
    """Return the ids that all prompts of a batch begin with, and whether they are the recipe's.

    Those of the batch alone are computed once if they are many, and not kept: they may be as long as the context.
    """
    rows = [_leading(*row) for row in zip(batch.ids.tolist(), batch.visual.tolist(), batch.mask.tolist(), strict=True)]
    common = rows[0][: min(shared_length(rows[0], row) for row in rows)]
    texts = list(takewhile(lambda piece: not is_image(piece), preamble(model.spec.prompt)))
    of_recipe = encode(texts, lm=model.lm, num_visual=0).ids if texts else []
    length = shared_length(common, of_recipe)
    if length >= SHORTEST:
        return common[:length], True
    return (common if len(common) >= SHORTEST and len(common) * (len(rows) - 1) >= SAVED else []), False


def _leading(ids: list[int], visual: list[bool], mask: list[int]) -> list[int]:
    """Return a row's ids before its first image, and before its last one: a token is needed to start from."""
    start = mask.index(1)
    end = visual.index(True) if any(visual) else len(ids) - 1
    return ids[start:end]
