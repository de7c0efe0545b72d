"""The runner of a language model: how it is run on embeddings, chosen by what the model can do.

- `CachedRunner`: decoders that honour masks, on padded batches and with a KV cache.
- `UnpaddedRunner`: decoders that ignore masks (mostly state-space and recurrent models). Rows of equal length run
  together, without padding, and embeddings are cached instead of states.
- `EncoderDecoderRunner`: the encoder reads the prompt, the decoder generates the answer.
- `PrefixedRunner` and `CrossAttendingRunner` wrap another runner for adapters.

All have the same methods, so no caller asks which one it has.

Shapes: B batch, T positions, K positions asked for, N answers, L tokens of an answer, V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from mllm.lms import vocabulary
from mllm.lms.cross_attention import CrossAttentionMemory, using_memory
from mllm.prompts.batch import IGNORED


class Group(NamedTuple):
    """Rows that one call of `transformers`' ``generate`` decodes.

    Args:
        rows: their numbers in the batch.
        inputs: arguments of ``generate``.
        start: how many ids come back that are not new.
        memory: the rows' cross-attention memory, if they have one.
    """

    rows: list[int]
    inputs: dict[str, Any]
    start: int
    memory: CrossAttentionMemory | None = None


class Runner(Protocol):
    """Runs a language model of `transformers` on embeddings.

    Attributes:
        separable: whether the model is a body and a head, so that logits are computed for targets only. It is probed
            when first needed; setting it skips the probe.
    """

    separable: bool

    @property
    def model(self) -> Any:
        """Return the model of `transformers`."""

    @property
    def inner(self) -> Runner | None:
        """Return the runner that this one wraps, if it does."""

    @property
    def whole_batches(self) -> bool:
        """Whether a batch is one forward pass, whatever the lengths of its rows."""

    @property
    def takes_block_masks(self) -> bool:
        """Whether masks ``(B, T, T)`` of packed rows may be tried; see `mllm.lms.runners.probes.can_pack`."""

    @property
    def continues_cache(self) -> bool:
        """Whether several positions at once can follow a KV cache."""

    @property
    def shares_prefix(self) -> bool:
        """Whether a batch's rows can start from the KV cache of one sequence; see `mllm.lms.shared_prefix.shifted`."""

    @property
    def selects_logits(self) -> bool:
        """Whether the model computes logits at given positions only."""

    @property
    def window(self) -> int | None:
        """Return the length of the shortest sliding window, masked positions counted; None: there is none."""

    def logits(self, embeds: Any, mask: Tensor, keep: Tensor | None = None, cache: Any = None) -> Tensor:
        """Return logits ``(B, K, V)``; see `mllm.lms.language_model.LanguageModel.logits`."""

    def losses(self, embeds: Any, mask: Tensor, labels: Tensor, *, smoothing: float = 0.0) -> Tensor:
        """Return the negative log-likelihood ``(N,)`` of each target, row by row, with label smoothing."""

    def hidden(self, embeds: Any, mask: Tensor) -> Tensor:
        """Return the states ``(B, T, D)`` that the output embeddings are applied to."""

    def prefill(self, embeds: Any, mask: Tensor) -> tuple[Any, Tensor]:
        """Return the cache of a batch, and the next token's logits ``(B, V)``."""

    def fork(self, cache: Any, rows: Sequence[int]) -> Any:
        """Return a copy of a cache's rows, to be extended."""

    def step(self, cache: Any, ids: Tensor, mask: Tensor, rows: Sequence[int] | None) -> Tensor:
        """Return logits ``(N, V)`` after the first tokens of answers; all but the last of them are in the cache."""

    def length(self, cache: Any) -> int:
        """Return the sequence length of a cache."""

    def groups(self, mask: Tensor, cache: Any = None, **inputs: Any) -> Iterator[Group]:
        """Yield the rows that `transformers` decodes in one call."""


class WrappingRunner:
    """A base of runners that wrap another one: its properties are those of the inner runner.

    Args:
        inner: the runner.
    """

    shares_prefix = False  # positions or memory of the wrapper belong to each row

    def __init__(self, inner: Runner) -> None:
        self._inner = inner

    @property
    def inner(self) -> Runner:
        """Return the runner that is wrapped."""
        return self._inner

    @property
    def model(self) -> Any:
        """Return the model of `transformers`."""
        return self.inner.model

    @property
    def separable(self) -> bool:
        """Whether the model is a body and a head."""
        return self.inner.separable

    @separable.setter
    def separable(self, value: bool) -> None:
        self.inner.separable = value

    @property
    def whole_batches(self) -> bool:
        """Whether a batch is one forward pass, whatever the lengths of its rows."""
        return self.inner.whole_batches

    @property
    def takes_block_masks(self) -> bool:
        """Whether masks ``(B, T, T)`` of packed rows may be tried."""
        return self.inner.takes_block_masks

    @property
    def continues_cache(self) -> bool:
        """Whether several positions at once can follow a KV cache."""
        return self.inner.continues_cache

    @property
    def selects_logits(self) -> bool:
        """Whether the model computes logits at given positions only."""
        return self.inner.selects_logits

    @property
    def window(self) -> int | None:
        """Return the length of the shortest sliding window, masked positions counted; None: there is none."""
        return self.inner.window


class DecoderRunner(ABC):
    """A base of runners of decoders.

    Args:
        model: a causal language model of `transformers`.
    """

    inner: Runner | None = None

    def __init__(self, model: Any) -> None:
        self.model = model
        self._separable: bool | None = None

    @property
    def separable(self) -> bool:
        """Whether the model is a body and a head."""
        if self._separable is None:
            with using_memory(None):  # the probe's sequence is not the one that runs
                self._separable = vocabulary.separable(self.model)
        return self._separable

    @separable.setter
    def separable(self, value: bool) -> None:
        self._separable = value

    @abstractmethod
    def body(self, embeds: Tensor, mask: Tensor, cache: Any = None) -> tuple[Tensor, type]:
        """Return the body's states ``(B, T, D)``, and the class of its output."""

    @abstractmethod
    def logits(self, embeds: Tensor, mask: Tensor, keep: Tensor | None = None, cache: Any = None) -> Tensor:
        """Return logits ``(B, K, V)``; see `mllm.lms.language_model.LanguageModel.logits`."""

    def losses(
        self, embeds: Tensor, mask: Tensor, labels: Tensor, cache: Any = None, *, smoothing: float = 0.0
    ) -> Tensor:
        """Return the negative log-likelihood ``(N,)`` of each target, row by row, with label smoothing."""
        chosen = labels[:, 1:] != IGNORED  # at each position: whether what follows it is a target
        targets = labels[:, 1:][chosen]  # (N,)
        if self.separable:
            states, output_class = self.body(embeds, mask, cache)
            return vocabulary.losses(self.model, states[:, :-1][chosen], targets, output_class, smoothing=smoothing)
        keep = chosen.any(0).nonzero().squeeze(1)  # (K,)
        logits = self.logits(embeds, mask, keep, cache)[chosen[:, keep]]  # (N, V)
        return cross_entropy(logits.float(), targets, reduction="none", label_smoothing=smoothing)


def position_ids(mask: Tensor) -> Tensor:
    """Return position ids ``(B, T)`` that count a row's unmasked tokens, so that left padding shifts nothing.

    With several prompts in a row, mask ``(B, T, T)``, each is counted from 0.
    """
    if mask.dim() == 3:
        return mask.long().sum(-1) - 1
    return (mask.long().cumsum(-1) - 1).clamp(min=0)


def move_left(values: Tensor, inside: Tensor) -> tuple[Tensor, Tensor]:
    """Move what is inside to the start of each row: values ``(B, S, ...)`` and which of them are inside ``(B, S)``."""
    order = inside.long().argsort(dim=1, descending=True, stable=True)[:, : int(inside.sum(1).max())]
    return values[torch.arange(len(values), device=values.device)[:, None], order], inside.gather(1, order)


def by_length(mask: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the rows of each length, and where their tokens are."""
    lengths = mask.sum(1)
    for length in lengths.unique().tolist():
        rows = (lengths == length).nonzero().squeeze(1)
        yield rows, mask[rows].bool()


def input_embeddings(model: Any, cache: Any, inputs: dict[str, Tensor]) -> Tensor:
    """Return the embeddings of the whole input: those of an embedding cache, and of the ids after it."""
    if cache is None:
        return inputs["inputs_embeds"]
    return cache.add(model.get_input_embeddings()(inputs["input_ids"][:, cache.embeds.shape[1] :]))


def capture_head_input(model: Any, run: Callable[[], Any]) -> Tensor:
    """Return the input of the output embeddings while the model runs; they are computed at one position only."""
    captured: list[Tensor] = []

    def capture(module: torch.nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        captured.append(args[0])
        return (args[0][:, :1].contiguous(), *args[1:])  # of a view torch copies the vocabulary for each row

    hook = model.get_output_embeddings().register_forward_pre_hook(capture)
    try:
        run()
    finally:
        hook.remove()
    return captured[0]
