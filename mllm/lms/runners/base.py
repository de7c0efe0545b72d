"""How a language model is run on embeddings: three ways, chosen by what it can do.

Notable: `Cached` is for decoders that honour masks, on padded batches and with key-value states. `Apart` is for those
that do not (state-space and recurrent models, mostly): rows of equal length run together, without padding, and what was
seen is kept as embeddings. `EncoderDecoder` reads all that stands before an answer in the encoder, and makes the answer
in the decoder. All have the same methods, so nothing else needs to know.

Shapes: B batch, T positions, K positions asked for, N answers, L tokens of an answer, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from mllm.lms import vocabulary
from mllm.lms.cross_attention import Sight
from mllm.prompts.batch import IGNORED


class Group(NamedTuple):
    """Rows that are decoded together, what `transformers` is given for them, and how many ids come back unasked.

    ``sight`` is what they look at beside their sequences; see `mllm.lms.cross_attention`.
    """

    rows: list[int]
    inputs: dict[str, Any]
    start: int
    sight: Sight | None = None


def positions(mask: Tensor) -> Tensor:
    """Return position ids ``(B, T)`` that count a row's own tokens, so that padding on the left moves nothing.

    Of several prompts in a row, mask ``(B, T, T)``, each is counted anew.
    """
    if mask.dim() == 3:
        return mask.long().sum(-1) - 1
    return (mask.long().cumsum(-1) - 1).clamp(min=0)


def losses_of(way: Any, embeds: Tensor, mask: Tensor, labels: Tensor, cache: Any = None) -> Tensor:
    """Return the negative log-likelihood ``(N,)`` of each target of a decoder, row by row."""
    chosen = labels[:, 1:] != IGNORED  # at each position: whether what follows it is a target
    wanted = labels[:, 1:][chosen]  # (N,)
    if way.separable:
        states, kind = way.body(embeds, mask, cache)
        return vocabulary.losses(way.model, states[:, :-1][chosen], wanted, kind)
    keep = chosen.any(0).nonzero().squeeze(1)  # (K,)
    logits = way.logits(embeds, mask, keep, cache)[chosen[:, keep]]  # (N, V)
    return cross_entropy(logits.float(), wanted, reduction="none")


def packed(values: Tensor, inside: Tensor) -> tuple[Tensor, Tensor]:
    """Move what is inside to the start of each row: values ``(B, S, ...)`` and which of them are inside ``(B, S)``."""
    order = inside.long().argsort(dim=1, descending=True, stable=True)[:, : int(inside.sum(1).max())]
    return values[torch.arange(len(values), device=values.device)[:, None], order], inside.gather(1, order)


def by_length(mask: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the rows of each length, and where their tokens are."""
    lengths = mask.sum(1)
    for length in lengths.unique().tolist():
        rows = (lengths == length).nonzero().squeeze(1)
        yield rows, mask[rows].bool()


def whole_embeds(model: Any, cache: Any, inputs: dict[str, Tensor]) -> Tensor:
    """Return the embeddings of all that is read: of what was seen, and of the ids behind it."""
    if cache is None:
        return inputs["inputs_embeds"]
    return cache.add(model.get_input_embeddings()(inputs["input_ids"][:, cache.embeds.shape[1] :]))


def read_by_head(model: Any, run: Callable[[], Any]) -> Tensor:
    """Return what the vocabulary's map is given while the model runs; the map itself is spared all but one position."""
    found: list[Tensor] = []

    def read(module: torch.nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        found.append(args[0])
        return (args[0][:, :1].contiguous(), *args[1:])  # of a view torch copies the vocabulary for each row

    hook = model.get_output_embeddings().register_forward_pre_hook(read)
    try:
        run()
    finally:
        hook.remove()
    return found[0]
