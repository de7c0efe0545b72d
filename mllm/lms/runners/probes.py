"""Probes of what a language model can do: a few tokens, run in two ways that must give the same logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException

from mllm.devices import has_values
from mllm.lms import vocabulary
from mllm.lms.runners.base import Runner
from mllm.lms.shared_prefix import can_shift, shifted


def can_run(runner: Runner) -> bool:
    """Whether padding and masked positions change nothing, so that the model runs with padding and a KV cache."""
    ids, embeds = _probe(runner)
    with torch.no_grad():
        plain = runner.logits(embeds[:, [2, 3, 4, 6]], torch.ones_like(ids[:, :4]))[:, -1]
        cache, _ = runner.prefill(embeds[:, :6], torch.tensor([[0, 0, 1, 1, 1, 1]], device=ids.device))
        mask = torch.tensor([[0, 0, 1, 1, 1, 0, 1]], device=ids.device)
        masked = runner.logits(embeds[:, 6:], mask, cache=cache)[:, -1]
    return _alike(runner.model, plain, masked)


def can_pack(runner: Runner) -> bool:
    """Whether two prompts that share a row have the logits that each has alone."""
    if not runner.takes_block_masks:
        return False
    with torch.no_grad(), vocabulary.without_dropout(runner.model):
        ids, embeds = _probe(runner)
        block = torch.block_diag(torch.ones(3, 3), torch.ones(4, 4)).tril().bool().to(ids.device)
        alone = [runner.logits(part, torch.ones_like(part[..., 0].long())) for part in embeds.split([3, 4], dim=1)]
        try:
            packed = runner.logits(embeds, block[None])
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
            return False  # it takes masks (B, T) alone
    return _alike(runner.model, torch.cat(alone, dim=1), packed)


def continues_cache(runner: Runner) -> bool:
    """Whether several positions at once can follow a KV cache; assumed of weights without values, in a plan."""
    if not has_values(runner.model.get_input_embeddings().weight):
        return True
    with torch.no_grad(), vocabulary.without_dropout(runner.model):
        ids, embeds = _probe(runner)
        mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1]], device=ids.device)
        cache, _ = runner.prefill(embeds[:, :5], mask[:, :5])
        return _alike(
            runner.model, runner.logits(embeds, mask)[:, -2:], runner.logits(embeds[:, 5:], mask, cache=cache)
        )


def shares_prefix(runner: Runner) -> bool:
    """Whether a padded row can start from the KV cache of a sequence that was run alone."""
    with torch.no_grad(), vocabulary.without_dropout(runner.model):
        ids, embeds = _probe(runner)
        cache, _ = runner.prefill(embeds[:, :4], torch.ones_like(ids[:, :4]))
        if not can_shift(cache, 4):
            return False
        mask = torch.tensor([[0, 1, 1, 1, 1, 1, 1]], device=ids.device)
        rest = runner.logits(embeds[:, 3:6], mask, cache=shifted(cache, torch.tensor([1], device=ids.device)))
        return _alike(runner.model, runner.logits(embeds[:, :6], torch.ones_like(ids[:, :6]))[:, 3:], rest)


def _probe(runner: Runner) -> tuple[Tensor, Tensor]:
    """Return ids ``(1, 7)`` and their embeddings."""
    table = runner.model.get_input_embeddings()
    ids = torch.arange(1, 8, device=runner.model.device)[None] % table.weight.shape[0]
    with torch.no_grad():
        return ids, table(ids)


def _alike(model: Any, expected: Tensor, logits: Tensor) -> bool:
    coarse = getattr(model, "is_quantized", False)  # its rounding depends on the whole batch
    eps = torch.finfo(torch.bfloat16 if coarse else expected.dtype).eps
    tolerance = eps ** (1 / 3) * expected.float().std()  # a model that ignores masks is far off
    try:
        return bool((expected - logits).float().std() <= tolerance)
    except DataDependentOutputException:  # a model without values, whose cost is estimated
        return True
