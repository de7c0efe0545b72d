"""Read the hidden states and the logits at some positions of a sequence, in one forward pass where possible."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

if TYPE_CHECKING:
    from mllm.lms.language_model import LanguageModel


def read_states(
    lm: LanguageModel, embeds: Tensor, mask: Tensor, keep: Tensor, frozen_prefix: int, num_logits: int | None
) -> tuple[Tensor, Tensor]:
    """Return states ``(B, K, D)`` and logits ``(B, K, V)``; see `mllm.lms.language_model.LanguageModel.read`."""
    cache = None
    if frozen_prefix and lm.runner.continues_cache and not _recomputes(lm):
        cache, _ = lm.prefill(embeds[:, :frozen_prefix], mask[:, :frozen_prefix])
        embeds, keep = embeds[:, frozen_prefix:], keep - frozen_prefix
    head_inputs: list[Tensor] = []
    count = num_logits if lm.runner.selects_logits else None

    def capture(_: nn.Module, args: Any) -> Any:
        head_inputs.append(args[0])
        return (args[0][:, :count].contiguous(), *args[1:])

    hook = lm.model.get_output_embeddings().register_forward_pre_hook(capture)
    try:
        logits = lm.runner.logits(embeds, mask, keep, cache)
    finally:
        hook.remove()
    if lm.model.config.is_encoder_decoder or len(head_inputs) > 1:
        return lm.hidden(embeds, mask)[:, keep], logits
    states = head_inputs[0]
    return (states if states.shape[1] == len(keep) else states[:, keep]), logits


def _recomputes(lm: LanguageModel) -> bool:
    """Whether layers recompute their activations in backward (gradient checkpointing); they take no cache then."""
    return any(layer.training for layer in lm.layers)
