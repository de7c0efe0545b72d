"""How a language model is run on embeddings: three ways, chosen by what it can do.

Notable: `Cached` is for decoders that honour masks, on padded batches and with key-value states. `Apart` is for those
that do not (state-space and recurrent models, mostly): rows of equal length run together, without padding, and what was
seen is kept as embeddings. `EncoderDecoder` reads all that stands before an answer in the encoder, and makes the answer
in the decoder. All have the same methods, so nothing else needs to know.

Shapes: B batch, T positions, K positions asked for, N answers, L tokens of an answer, V vocabulary.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, pad
from transformers import DynamicCache
from transformers.modeling_outputs import BaseModelOutput

from mllm.errors import MLLMError
from mllm.lms import vocabulary
from mllm.lms.sight import Sight, current, looking
from mllm.prompt import IGNORED


class Group(NamedTuple):
    """Rows that are decoded together, what `transformers` is given for them, and how many ids come back unasked.

    ``sight`` is what they look at beside their sequences; see `mllm.lms.sight`.
    """

    rows: list[int]
    inputs: dict[str, Any]
    start: int
    sight: Sight | None = None


class Cached:
    """A decoder on left-padded batches, with key-value states.

    Args:
        model: a causal language model of `transformers`.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self._accepts = set(inspect.signature(model.forward).parameters)
        self.keeps = "logits_to_keep" in self._accepts  # makes logits for some positions alone
        self._states = "cache" if "cache" in self._accepts else "past_key_values"  # renamed in transformers 5.24

    def can_run(self) -> bool:
        """Whether padding and masked places change nothing, by a probe: a few tokens, with and without them."""
        if not {"attention_mask", self._states} <= self._accepts:
            return False
        table = self.model.get_input_embeddings()
        ids = torch.arange(1, 8, device=self.model.device)[None] % table.weight.shape[0]
        with torch.no_grad():
            embeds = table(ids)
            plain = self.logits(embeds[:, [2, 3, 4, 6]], torch.ones_like(ids[:, :4]))[:, -1]
            cache, _ = self.prefill(embeds[:, :6], torch.tensor([[0, 0, 1, 1, 1, 1]], device=ids.device))
            mask = torch.tensor([[0, 0, 1, 1, 1, 0, 1]], device=ids.device)
            masked = self.logits(embeds[:, 6:], mask, cache=cache)[:, -1]
        return self._alike(plain, masked)

    def can_pack(self) -> bool:
        """Whether prompts that share a row do not touch each other, by a probe: two, packed and alone."""
        if self.windowed:  # a window over masked places is the model's own to make, from a mask of another form
            return False
        table = self.model.get_input_embeddings()
        ids = torch.arange(1, 8, device=self.model.device)[None] % table.weight.shape[0]
        block = torch.block_diag(torch.ones(3, 3), torch.ones(4, 4)).tril().bool().to(ids.device)
        with torch.no_grad(), vocabulary.still(self.model):
            embeds = table(ids)
            alone = [self.logits(part, torch.ones_like(part[..., 0].long())) for part in embeds.split([3, 4], dim=1)]
            try:
                packed = self.logits(embeds, block[None])
            except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
                return False  # it takes masks (B, T) alone
        return self._alike(torch.cat(alone, dim=1), packed)

    @functools.cached_property
    def goes_on(self) -> bool:
        """Whether several positions at once can follow on key-value states, by a probe: with them and without."""
        table = self.model.get_input_embeddings()
        ids = torch.arange(1, 8, device=self.model.device)[None] % table.weight.shape[0]
        mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1]], device=ids.device)
        with torch.no_grad(), vocabulary.still(self.model):
            embeds = table(ids)
            cache, _ = self.prefill(embeds[:, :5], mask[:, :5])
            return self._alike(self.logits(embeds, mask)[:, -2:], self.logits(embeds[:, 5:], mask, cache=cache))

    def _alike(self, expected: Tensor, found: Tensor) -> bool:
        coarse = getattr(self.model, "is_quantized", False)  # its rounding depends on the whole batch
        eps = torch.finfo(torch.bfloat16 if coarse else expected.dtype).eps
        tolerance = eps ** (1 / 3) * expected.float().std()  # what ignores masks is far off
        return bool((expected - found).float().std() <= tolerance)

    def logits(self, embeds: Tensor, mask: Tensor, keep: Tensor | None = None, cache: Any = None) -> Tensor:
        """Return logits ``(B, K, V)``; see `mllm.lm.LanguageModel.logits`."""
        options = self._inputs(embeds, mask, cache)
        if keep is None:
            return self.model(**options).logits
        if self.keeps:
            return self.model(**options, logits_to_keep=keep).logits
        return self.model(**options).logits[:, keep]

    def losses(self, embeds: Tensor, mask: Tensor, labels: Tensor, cache: Any = None) -> Tensor:
        """Return the negative log-likelihood ``(N,)`` of each target, row by row."""
        return _losses(self, embeds, mask, labels, cache)

    def body(self, embeds: Tensor, mask: Tensor, cache: Any = None) -> tuple[Tensor, type]:
        """Return the body's states ``(B, T, D)``, and the class of what it returns."""
        output = vocabulary.read(self.model, **self._inputs(embeds, mask, cache))
        return output.last_hidden_state, type(output)

    @functools.cached_property
    def separable(self) -> bool:
        """Whether the model is a body and a head."""
        with looking(None):  # it is tried on another sequence than the one that asks
            return vocabulary.separable(self.model)

    def hidden(self, embeds: Tensor, mask: Tensor, cache: Any = None) -> Tensor:
        """Return the states ``(B, T, D)`` that the vocabulary's map reads."""
        return _read_by_vocabulary(self.model, lambda: self.model(**self._inputs(embeds, mask, cache)))

    def prefill(self, embeds: Tensor, mask: Tensor, cache: Any = None) -> tuple[Any, Tensor]:
        """Return the key-value states, and the next token's logits ``(B, V)``."""
        last = {"logits_to_keep": 1} if self.keeps else {}
        output = self.model(**{**self._inputs(embeds, mask, cache), "use_cache": True}, **last)
        return output[self._states], output.logits[:, -1]

    def fork(self, cache: Any, rows: Sequence[int]) -> Any:
        """Return the states of these rows, to be added to."""
        new = copy.copy(cache)
        new.layers = [copy.copy(layer) for layer in cache.layers]
        new.reorder_cache(torch.tensor(rows, device=self.model.device))  # makes new tensors
        return new

    def step(self, cache: Any, ids: Tensor, mask: Tensor, rows: Sequence[int] | None) -> Tensor:
        """Return logits ``(N, V)`` behind the first tokens of answers; all but the last of them are in the cache."""
        if rows is not None:
            cache.reorder_cache(torch.tensor(rows, device=ids.device))
        whole = torch.cat([mask.expand(len(ids), -1), torch.ones_like(ids)], dim=1)
        return self.logits(self.model.get_input_embeddings()(ids[:, -1:]), whole, cache=cache)[:, -1]

    def groups(self, mask: Tensor, cache: Any = None, **inputs: Tensor) -> Iterator[Group]:
        """Yield what `transformers` decodes in one go."""
        start = inputs["input_ids"].shape[1] if "input_ids" in inputs else 0
        yield Group([*range(len(mask))], {"attention_mask": mask, self._states: cache, **inputs}, start)

    @property
    def window(self) -> int | None:
        """Return over how many places a layer looks back, masked ones counted; None: over all."""
        layers: list[Any] = DynamicCache(config=self.model.config).layers
        return min((layer.sliding_window for layer in layers if getattr(layer, "is_sliding", False)), default=None)

    @property
    def windowed(self) -> bool:
        """Whether a layer looks back over so many places only."""
        return self.window is not None

    def length(self, cache: Any) -> int:
        """Return how many positions are in the cache."""
        return int(cache.get_seq_length())

    def _inputs(self, embeds: Tensor, mask: Tensor, cache: Any = None) -> dict[str, Any]:
        options: dict[str, Any] = {"inputs_embeds": embeds, "attention_mask": mask}
        if mask.dim() == 3:
            lowest = torch.finfo(embeds.dtype).min
            hidden = torch.zeros_like(mask, dtype=embeds.dtype).masked_fill(~mask, lowest)
            options["attention_mask"] = hidden[:, None]  # (B, 1, T, T), added to the attention's scores
        if cache is not None:
            options |= {self._states: cache, "use_cache": True}
        elif "use_cache" in self._accepts:
            options["use_cache"] = False
        if "position_ids" in self._accepts:
            options["position_ids"] = positions(mask)[:, -embeds.shape[1] :]
        return options


class Seen:
    """What was read, kept as embeddings ``(B, T, D)``: where states cannot be gone on from, it is read again."""

    def __init__(self, embeds: Tensor) -> None:
        self.embeds = embeds
        self.states: Any = None  # an encoder's, of all that was read

    def add(self, embeds: Tensor) -> Tensor:
        """Add what was read since, and return all."""
        self.embeds, self.states = torch.cat([self.embeds, embeds], dim=1), None
        return self.embeds


class Apart:
    """A decoder that ignores masks: rows of equal length run together, masked places left out.

    Args:
        model: a causal language model of `transformers`.
    """

    goes_on = False  # there are no states to go on from

    def __init__(self, model: Any) -> None:
        self.model = model

    def can_pack(self) -> bool:
        """Whether prompts can share a row."""
        return False

    def logits(self, embeds: Tensor, mask: Tensor, keep: Tensor | None = None, cache: Any = None) -> Tensor:
        """Return logits ``(B, K, V)``; see `mllm.lm.LanguageModel.logits`."""
        new = embeds.shape[1]
        embeds = embeds if cache is None else cache.add(embeds)
        logits = self._by_length(lambda own: self.model(inputs_embeds=own, use_cache=False).logits, embeds, mask)
        return logits[:, -new:] if keep is None else logits[:, -new:][:, keep]

    def losses(self, embeds: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
        """Return the negative log-likelihood ``(N,)`` of each target, row by row."""
        return _losses(self, embeds, mask, labels)

    def body(self, embeds: Tensor, mask: Tensor, cache: Any = None) -> tuple[Tensor, type]:
        """Return the body's states ``(B, T, D)``, and the class of what it returns."""
        kinds = []

        def run(own: Tensor) -> Tensor:
            output = vocabulary.read(self.model, inputs_embeds=own, use_cache=False)
            kinds.append(type(output))
            return output.last_hidden_state

        return self._by_length(run, embeds, mask), kinds[0]

    @functools.cached_property
    def separable(self) -> bool:
        """Whether the model is a body and a head."""
        with looking(None):  # it is tried on another sequence than the one that asks
            return vocabulary.separable(self.model)

    def hidden(self, embeds: Tensor, mask: Tensor) -> Tensor:
        """Return the states ``(B, T, D)`` that the vocabulary's map reads."""

        def run(own: Tensor) -> Tensor:
            return _read_by_vocabulary(self.model, lambda: self.model(inputs_embeds=own, use_cache=False))

        return self._by_length(run, embeds, mask)

    def prefill(self, embeds: Tensor, mask: Tensor) -> tuple[Seen, Tensor]:
        """Return what was seen, and the next token's logits ``(B, V)``."""
        return Seen(embeds), self.logits(embeds, mask)[:, -1]

    def fork(self, cache: Seen, rows: Sequence[int]) -> Seen:
        """Return what these rows saw, to be added to."""
        return Seen(cache.embeds[list(rows)])

    def step(self, cache: Seen, ids: Tensor, mask: Tensor, rows: Sequence[int] | None) -> Tensor:
        """Return logits ``(N, V)`` behind the first tokens of answers."""
        new = self.model.get_input_embeddings()(ids)
        whole = torch.cat([mask.expand(len(ids), -1), torch.ones_like(ids)], dim=1)
        return self.logits(torch.cat([cache.embeds.expand(len(ids), -1, -1), new], dim=1), whole)[:, -1]

    def length(self, cache: Seen) -> int:
        """Return how many positions were seen."""
        return cache.embeds.shape[1]

    def groups(self, mask: Tensor, cache: Seen | None = None, **inputs: Tensor) -> Iterator[Group]:
        """Yield what `transformers` decodes in one go: rows of one length."""
        embeds = _whole(self.model, cache, inputs)
        for rows, inside in _lengths(mask):
            own = embeds[rows][inside].unflatten(0, (len(rows), -1))
            ones = torch.ones(own.shape[:2], dtype=torch.long, device=own.device)
            yield Group(rows.tolist(), {"inputs_embeds": own, "attention_mask": ones}, 0)

    def _by_length(self, run: Callable[[Tensor], Tensor], embeds: Tensor, mask: Tensor) -> Tensor:
        """Run rows of each length, and put what comes out ``(n, length, X)`` where it belongs in ``(B, T, X)``."""
        places, values, sight = [], [], current()
        for rows, inside in _lengths(mask):
            row, column = inside.nonzero(as_tuple=True)
            places.append(torch.stack([rows[row], column]))
            with looking(sight and sight.unpadded(rows, mask)):
                values.append(run(embeds[rows][inside].unflatten(0, (len(rows), -1))).flatten(0, 1))
        found, (row, column) = torch.cat(values), torch.cat(places, dim=1)
        return found.new_zeros(*mask.shape, found.shape[-1]).index_put((row, column), found)


class EncoderDecoder:
    """An encoder that reads what stands before an answer, and a decoder that makes the answer.

    Several answers in a row (a conversation that is learnt) are as many rows of the decoder, each with all that stands
    before it in the encoder: as when they are generated. Rows are padded on the right, where positions start at 0.

    Args:
        model: an encoder-decoder model of `transformers`.
        end: ids that the tokenizer puts behind a text: the encoder reads them last.
    """

    goes_on = False

    def __init__(self, model: Any, end: Sequence[int]) -> None:
        self.model = model
        self._end = list(end)
        given = (model.generation_config.decoder_start_token_id, getattr(model.config, "decoder_start_token_id", None))
        start = next((token for token in given if token is not None), model.generation_config.bos_token_id)
        if start is None:
            raise MLLMError(
                "This encoder-decoder model does not say which token its decoder starts with: set "
                "decoder_start_token_id in its generation_config.json."
            )
        self._start = int(start)

    def can_pack(self) -> bool:
        """Whether prompts can share a row."""
        return False

    def logits(self, embeds: Tensor, mask: Tensor, keep: Tensor | None = None, cache: Any = None) -> Tensor:
        """Return logits ``(B, 1, V)`` of an answer's first token."""
        embeds = embeds if cache is None else cache.add(embeds)
        return self._decoded(self._encoded(embeds, mask), mask.new_empty(len(mask), 0))

    def losses(self, embeds: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
        """Return the negative log-likelihood ``(N,)`` of each target, row by row."""
        wanted = labels != IGNORED
        begins = wanted & ~pad(wanted, (1, 0))[:, :-1]
        rows, columns = begins.nonzero(as_tuple=True)  # of each answer
        before = mask[rows].bool() & (torch.arange(mask.shape[1], device=mask.device) < columns[:, None])
        number = begins.cumsum(1)  # of the answer that a place belongs to, in its row
        own = wanted[rows] & (number[rows] == number[rows, columns][:, None])
        answers, inside = _packed(labels[rows], own)
        logits = self._decoded(self._encoded(embeds[rows], before.long()), answers.masked_fill(~inside, 0)[:, :-1])
        return cross_entropy(logits[inside].float(), answers[inside], reduction="none")

    def hidden(self, embeds: Tensor, mask: Tensor) -> Tensor:
        """Refuse: the states of a sequence and those of the decoder are not the same."""
        raise MLLMError("A head reads a decoder's states of the sequence; this is an encoder-decoder model.")

    def prefill(self, embeds: Tensor, mask: Tensor) -> tuple[Seen, Tensor]:
        """Return what was seen, with the encoder's states of it, and the answer's first logits ``(B, V)``."""
        seen = Seen(embeds)
        seen.states = self._encoded(embeds, mask)
        return seen, self._decoded(seen.states, mask.new_empty(len(mask), 0))[:, -1]

    def fork(self, cache: Seen, rows: Sequence[int]) -> Seen:
        """Return what these rows saw, to be added to."""
        new = Seen(cache.embeds[list(rows)])
        if cache.states is not None:
            new.states = tuple(states[list(rows)] for states in cache.states)
        return new

    def step(self, cache: Seen, ids: Tensor, mask: Tensor, rows: Sequence[int] | None) -> Tensor:
        """Return logits ``(N, V)`` behind the first tokens of answers; the encoder runs once."""
        if cache.states is None:
            cache.states = self._encoded(cache.embeds, mask)
        states, inside = cache.states
        return self._decoded((states.expand(len(ids), -1, -1), inside.expand(len(ids), -1)), ids)[:, -1]

    def length(self, cache: Seen) -> int:
        """Return how many positions were seen."""
        return cache.embeds.shape[1]

    def groups(self, mask: Tensor, cache: Seen | None = None, **inputs: Tensor) -> Iterator[Group]:
        """Yield what `transformers` decodes in one go."""
        embeds, inside = self._ended(_whole(self.model, cache, inputs), mask)
        yield Group([*range(len(mask))], {"inputs_embeds": embeds, "attention_mask": inside.long()}, 1)

    def _ended(self, embeds: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Put the end behind each row and pad it on the right: embeddings and which of them count."""
        end = torch.tensor([self._end], dtype=torch.long, device=mask.device).expand(len(mask), -1)
        whole = torch.cat([embeds, self.model.get_input_embeddings()(end).to(embeds.dtype)], dim=1)
        return _packed(whole, torch.cat([mask, torch.ones_like(end)], dim=1).bool())

    def _encoded(self, embeds: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        own, inside = self._ended(embeds, mask)
        return self.model.get_encoder()(inputs_embeds=own, attention_mask=inside.long()).last_hidden_state, inside

    def _decoded(self, encoded: tuple[Tensor, Tensor], answers: Tensor) -> Tensor:
        """Return logits ``(N, L + 1, V)``: of each answer's first token, and of what follows each of its tokens."""
        states, inside = encoded
        first = answers.new_full((len(answers), 1), self._start)
        return self.model(
            encoder_outputs=BaseModelOutput(last_hidden_state=states),
            attention_mask=inside.long(),
            decoder_input_ids=torch.cat([first, answers], dim=1),
            use_cache=False,
        ).logits


def positions(mask: Tensor) -> Tensor:
    """Return position ids ``(B, T)`` that count a row's own tokens, so that padding on the left moves nothing.

    Of several prompts in a row, mask ``(B, T, T)``, each is counted anew.
    """
    if mask.dim() == 3:
        return mask.long().sum(-1) - 1
    return (mask.long().cumsum(-1) - 1).clamp(min=0)


def _losses(way: Cached | Apart, embeds: Tensor, mask: Tensor, labels: Tensor, cache: Any = None) -> Tensor:
    """Return the negative log-likelihood ``(N,)`` of each target of a decoder, row by row."""
    chosen = labels[:, 1:] != IGNORED  # at each position: whether what follows it is a target
    wanted = labels[:, 1:][chosen]  # (N,)
    if way.separable:
        states, kind = way.body(embeds, mask, cache)
        return vocabulary.losses(way.model, states[:, :-1][chosen], wanted, kind)
    keep = chosen.any(0).nonzero().squeeze(1)  # (K,)
    logits = way.logits(embeds, mask, keep, cache)[chosen[:, keep]]  # (N, V)
    return cross_entropy(logits.float(), wanted, reduction="none")


def _packed(values: Tensor, inside: Tensor) -> tuple[Tensor, Tensor]:
    """Move what is inside to the start of each row: values ``(B, S, ...)`` and which of them are inside ``(B, S)``."""
    order = inside.long().argsort(dim=1, descending=True, stable=True)[:, : int(inside.sum(1).max())]
    return values[torch.arange(len(values), device=values.device)[:, None], order], inside.gather(1, order)


def _lengths(mask: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the rows of each length, and where their tokens are."""
    lengths = mask.sum(1)
    for length in lengths.unique().tolist():
        rows = (lengths == length).nonzero().squeeze(1)
        yield rows, mask[rows].bool()


def _whole(model: Any, cache: Seen | None, inputs: dict[str, Tensor]) -> Tensor:
    """Return the embeddings of all that is read: of what was seen, and of the ids behind it."""
    if cache is None:
        return inputs["inputs_embeds"]
    return cache.add(model.get_input_embeddings()(inputs["input_ids"][:, cache.embeds.shape[1] :]))


def _read_by_vocabulary(model: Any, run: Callable[[], Any]) -> Tensor:
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
