"""Insert adapters and new tokens into a language model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from mllm.capabilities import CrossAttention, PrefixAdapter
from mllm.config.parts import AssemblySpec
from mllm.devices import forked_rng
from mllm.errors import MLLMError
from mllm.lms.new_tokens import NewTokens
from mllm.registry import lookup, made


def build_tokens(spec: AssemblySpec, names: Sequence[str], *, lm: Any) -> NewTokens | None:
    """Add new tokens to a language model: their embeddings are separate parameters, and its tables do not change."""
    if not names:
        return None
    if lm is None:
        raise MLLMError("tokens: new tokens need a language model, and there is none. Give lm.")
    with forked_rng(spec.seed):
        tokens = NewTokens(lm.model, names)
    lm.new_tokens = tokens.ids()
    return tokens


def build_adapters(spec: AssemblySpec, *, lm: Any, varying: bool = False) -> list[nn.Module]:
    """Insert new adapters into a language model; their random weights depend on the specification's seed alone.

    ``varying``: the number of visual tokens is not the same for every image.
    """
    if spec.adapters and lm is None:
        raise MLLMError("adapters: adapters need a language model, and there is none. Give lm.")
    for index, part in enumerate(spec.adapters):
        if part in spec.adapters[:index]:
            raise MLLMError(f"adapters: {part.type} is given twice with the same options. Remove one.")
    with forked_rng(spec.seed):
        adapters = [
            made(lookup("adapters", part.type), f"adapter {part.type}", lm.model, **part.options())
            for part in spec.adapters
        ]
    _check_adapters(spec, adapters, varying)
    for adapter in adapters:
        if isinstance(adapter, PrefixAdapter):
            lm.prepend(adapter)
        if isinstance(adapter, CrossAttention):
            lm.cross_attend()
    return adapters


def _check_adapters(spec: AssemblySpec, adapters: Sequence[nn.Module], varying: bool) -> None:
    """Raise an `MLLMError` for adapters that cannot be combined with a cross-attention adapter."""
    named = [(part.type, adapter) for part, adapter in zip(spec.adapters, adapters, strict=True)]
    crossing = [name for name, adapter in named if isinstance(adapter, CrossAttention)]
    prefixes = [name for name, adapter in named if isinstance(adapter, PrefixAdapter)]
    if len(crossing) > 1:
        raise MLLMError(f"adapters: {' and '.join(crossing)} both attend to the visual tokens. Remove one.")
    if crossing and prefixes:
        raise MLLMError(
            f"adapters: {prefixes[0]} puts positions before the sequence, for which {crossing[0]} has no image to "
            "attend to. Remove one."
        )
    if crossing and varying:
        raise MLLMError(
            f"adapters: {crossing[0]} attends to as many visual tokens for every image, and with this encoder their "
            "number varies (encoder.tiles; encoder.fps or encoder.most of videos). Remove one of them."
        )
    if crossing and spec.connector is None:
        raise MLLMError(
            f"adapters: {crossing[0]} attends to a connector's visual tokens, and there is none: give a connector."
        )
