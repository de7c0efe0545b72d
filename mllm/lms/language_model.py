"""The language model: any causal or encoder-decoder model of `transformers`, frozen, fed with embeddings.

Notable: the model's own forward is used throughout (scaled embeddings, offset positions, soft-capping, sliding
windows), so no family is known by name; how it is run (`mllm.lms.runners`) depends on what it can do. Logits are made
for the positions asked for only.
"""

from __future__ import annotations

import functools
import re
import warnings
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    LogitsProcessorList,
    StoppingCriteriaList,
)
from transformers.modeling_layers import GradientCheckpointingLayer

from mllm.errors import MLLMError
from mllm.hub import loading as hub
from mllm.hub.fingerprints import fingerprint, tensor_hash
from mllm.lms import decoding
from mllm.lms.cross_attention import Sighted, looking
from mllm.lms.runners.choose import choose_runner
from mllm.lms.runners.cross_attending import Looking
from mllm.lms.runners.prefixed import Led
from mllm.lms.runners.unpadded import Apart


class LanguageModel(nn.Module):
    """A frozen language model and its tokenizer.

    Args:
        model: an installed part (``mllm/smollm2-135m``), a hub id or a folder.
        dtype: of the weights; ``auto``: as they are stored.
        quantize: ``8bit`` (LLM.int8, arXiv:2208.07339) or ``4bit`` (NF4, arXiv:2305.14314), by bitsandbytes.
        init: ``random`` keeps the architecture and draws new weights (a control).
        seed: of the random weights.

    Attributes:
        dim: D_lm.
        context: the most positions the model was made for, or None where it does not say.
    """

    def __init__(
        self,
        *,
        model: str,
        dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
        quantize: Literal["8bit", "4bit"] | None = None,
        init: Literal["pretrained", "random"] = "pretrained",
        seed: int = 0,
    ) -> None:
        super().__init__()
        folder = hub.resolve(model, group="lms")
        self.tokenizer = hub.load_processor(AutoTokenizer, folder)
        options: dict[str, Any] = {"dtype": dtype if dtype == "auto" else getattr(torch, dtype)}
        if quantize is not None:
            options["quantization_config"] = _quantization(quantize)
        self.model = hub.load_model(hub.language_class(folder), folder, init=init, seed=seed, **options)
        self.model.requires_grad_(False).eval()
        if (head := self.model.get_output_embeddings()) is not None:
            head.register_forward_pre_hook(whole_embeds)
        for module in self.model.modules():
            # bitsandbytes' fast 4-bit layout for CPUs, taken at the first pass without a gradient, makes every later
            # gradient wrong, and what is computed depend on what went before.
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
        self._folder, self._init = folder, init
        self._before = 0  # positions that adapters take
        self._pass = choose_runner(self.model, self._end_of_text())
        if init == "random" and self.model.device.type != "meta":
            _ = self.fingerprint  # before anything in it trains
        self.new_tokens: dict[str, int] = {}  # name -> id, beside the tokenizer's own

    @functools.cached_property
    def fingerprint(self) -> str:
        """Return what tells these weights from others."""
        return fingerprint(self._folder) if self._init == "pretrained" else tensor_hash(self.model)

    @property
    def dim(self) -> int:
        """Return D_lm, the width of the embeddings."""
        return int(self.model.get_input_embeddings().weight.shape[1])

    @property
    def context(self) -> int | None:
        """Return the most positions the model was made for, or None where it does not say."""
        config = self.model.config.get_text_config()
        names = ("max_position_embeddings", "n_positions", "max_seq_len")
        limit = next((getattr(config, name) for name in names if hasattr(config, name)), None)
        return None if limit is None else limit - self._before

    @property
    def bos(self) -> list[int]:
        """Return what every sequence starts with: the tokenizer's own first token, if it puts one."""
        ids = self.tokenizer("x").input_ids
        return ids[:1] if ids and ids[0] == self.tokenizer.bos_token_id else []

    @property
    def eos(self) -> int:
        """Return the id that ends an answer."""
        if self.tokenizer.eos_token_id is None:
            raise MLLMError("This language model's tokenizer has no end-of-sequence token, so no answer can end.")
        return int(self.tokenizer.eos_token_id)

    @property
    def pad(self) -> int:
        """Return the id that fills a batch; it is masked everywhere, so any will do."""
        pad = self.tokenizer.pad_token_id
        return int(self.eos if pad is None else pad)

    def tokenize(self, text: str, *, control: bool = False) -> list[int]:
        """Return the ids of a text, no special token added; ``control``: those in it are read as such."""
        if control and self.new_tokens:
            pattern = f"({'|'.join(map(re.escape, self.new_tokens))})"
            pieces = [piece for piece in re.split(pattern, text) if piece]
            return [i for piece in pieces for i in self._ids(piece, control=True)]
        return self._ids(text, control=control)

    def _ids(self, text: str, *, control: bool) -> list[int]:
        if control and text in self.new_tokens:
            return [self.new_tokens[text]]
        return list(self.tokenizer(text, add_special_tokens=False, split_special_tokens=not control).input_ids)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids, special tokens left out."""
        new = set(self.new_tokens.values())
        return str(self.tokenizer.decode([i for i in ids if i not in new], skip_special_tokens=True))

    def embed(self, ids: Tensor) -> Tensor:
        """Return embeddings ``(B, T, D_lm)`` of ids ``(B, T)``."""
        return self.model.get_input_embeddings()(ids)

    def embedding_scale(self) -> float:
        """Return the standard deviation of the embeddings: where a connector's output starts."""
        with torch.no_grad():
            ids = torch.arange(min(4096, self.model.get_input_embeddings().weight.shape[0]))
            return float(self.embed(ids.to(self.model.device)).float().std())

    @property
    def layers(self) -> list[nn.Module]:
        """Return the layers, as `transformers` marks them."""
        return [module for module in self.model.modules() if isinstance(module, GradientCheckpointingLayer)]

    @property
    def whole_batches(self) -> bool:
        """Whether a batch is one pass, whatever the lengths of its rows."""
        return not isinstance(getattr(self._pass, "way", self._pass), Apart)

    def can_pack(self) -> bool:
        """Whether prompts can share a row and not touch each other: tried, adapters and all."""
        return self._pass.can_pack()

    def logits(self, embeds: Tensor | Sighted, mask: Tensor, keep: Tensor | None = None, cache: Any = None) -> Tensor:
        """Return logits ``(B, K, V)`` at the positions ``keep (K,)`` of embeddings ``(B, T, D_lm)``.

        An encoder-decoder model has none but an answer's first, ``(B, 1, V)``.

        Args:
            embeds: the sequence; after a cache, what follows the cached part.
            mask: ``(B, T)``, 1 where there is a token; with a cache it covers the cached part too.
            keep: positions within T; None: all.
            cache: the states of what came before; it is added to.
        """
        return self._pass.logits(embeds, mask, keep, cache)

    def losses(self, embeds: Tensor | Sighted, mask: Tensor, labels: Tensor) -> Tensor:
        """Return the negative log-likelihood ``(N,)`` of each target, row by row.

        Args:
            embeds: ``(B, T, D_lm)``.
            mask: ``(B, T)``, 1 where there is a token; or ``(B, T, T)``, see `mllm.prompts.batch.Batch`.
            labels: ``(B, T)``, the ids; `mllm.prompts.batch.IGNORED` where there is no target. An encoder-decoder
                model's encoder reads what stands before an answer, and its decoder makes the answer.
        """
        return self._pass.losses(embeds, mask, labels)

    def hidden(self, embeds: Tensor | Sighted, mask: Tensor) -> Tensor:
        """Return the last states ``(B, T, D)``, those that the vocabulary's map reads.

        Raises:
            MLLMError: an encoder-decoder model, which has none of a sequence.
        """
        return self._pass.hidden(embeds, mask)

    def read(
        self, embeds: Tensor, mask: Tensor, keep: Tensor, fixed: int = 0, said: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return, at the positions ``keep (K,)``, the last states ``(B, K, D)`` and the logits ``(B, K, V)``.

        It is one pass where the model can.

        Args:
            embeds: ``(B, T, D_lm)``.
            mask: ``(B, T)``, 1 where there is a token.
            keep: positions, none of them among the fixed ones.
            fixed: how many of the first positions no gradient is to reach: where nothing in the language model trains,
                none is kept for them, which saves most of a step.
            said: of how many of the positions, from the first, logits are needed; None: all. The others' may be left
                out.

        Raises:
            MLLMError: an encoder-decoder model, which has no states of a sequence.
        """
        cache = None
        if fixed and self._pass.goes_on and not self._recomputes:
            cache, _ = self.prefill(embeds[:, :fixed], mask[:, :fixed])
            embeds, keep = embeds[:, fixed:], keep - fixed
        found: list[Tensor] = []
        head = self.model.get_output_embeddings()
        spared = said if getattr(self._pass, "keeps", False) else None

        def catch(_: nn.Module, args: Any) -> Any:
            found.append(args[0])
            return (args[0][:, :spared].contiguous(), *args[1:])

        hook = head.register_forward_pre_hook(catch)
        try:
            logits = self._pass.logits(embeds, mask, keep, cache)
        finally:
            hook.remove()
        if self.model.config.is_encoder_decoder or len(found) > 1:
            return self.hidden(embeds, mask)[:, keep], logits
        return (found[0] if found[0].shape[1] == len(keep) else found[0][:, keep]), logits

    @property
    def _recomputes(self) -> bool:
        """Whether layers compute their activations again for the gradient; they take no states then."""
        return any(layer.training for layer in self.layers)

    @torch.no_grad()
    def prefill(self, embeds: Tensor | Sighted, mask: Tensor) -> tuple[Any, Tensor]:
        """Return the states of sequences ``(B, T, D_lm)``, to go on from, and the next token's logits ``(B, V)``."""
        return self._pass.prefill(embeds, mask)

    def fork(self, cache: Any, rows: Sequence[int] = (0,)) -> Any:
        """Return the states of these rows, to be added to; the original stays as it is."""
        return self._pass.fork(cache, rows)

    def length(self, cache: Any) -> int:
        """Return how many positions the states hold."""
        return int(self._pass.length(cache))

    @property
    def window(self) -> int | None:
        """Return how many places may stand where some between others are masked; None: any number."""
        return getattr(getattr(self._pass, "way", self._pass), "window", None)

    def beyond(self, length: int) -> bool:
        """Whether so many places are more than may stand where some between others are masked."""
        return self.window is not None and length > self.window

    def lead(self, adapter: Any) -> None:
        """Put an adapter's positions before every sequence; see `mllm.lms.runners.prefixed.Led`."""
        self._pass = Led(self._pass, adapter)
        self._before += adapter.num_positions

    def look(self) -> None:
        """Let blocks inside the layers look at what stands beside sequences; see `mllm.lms.cross_attention`."""
        self._pass = Looking(self._pass)

    def step(self, cache: Any, ids: Tensor, mask: Tensor, rows: Sequence[int] | None = None) -> Tensor:
        """Return logits ``(N, V)`` of what follows the first tokens ``ids (N, L)`` of answers.

        Args:
            cache: the states of what is answered and of the first L - 1 tokens; it is added to.
            ids: the answers' first tokens.
            mask: ``(N or 1, T)`` of what is answered.
            rows: the row of the cache that each answer goes on from; None: its own.
        """
        return self._pass.step(cache, ids, mask, rows)

    def generate(
        self,
        mask: Tensor,
        decodings: Sequence[dict[str, Any]],
        *,
        cache: Any = None,
        streamer: Any = None,
        **inputs: Tensor | Sighted,
    ) -> list[list[int]]:
        """Return the new ids of each sequence, by `transformers`' own decoding.

        Args:
            mask: ``(B, T)``.
            decodings: each row's settings: fields of `transformers.GenerationConfig`, ``seed``, ``logits_processor``.
            cache: the states of the first positions; it is added to.
            streamer: is given the tokens as they come (`transformers.TextIteratorStreamer`).
            inputs: ``inputs_embeds (B, T, D_lm)`` or ``input_ids (B, T)``.

        Raises:
            MLLMError: a setting that is unknown, or that rows decoded together cannot differ in.
        """
        for settings in decodings:
            decoding.check(settings)
        options = decoding.shared(decodings)
        processors = [*options.pop("logits_processor", [])]
        beams = options.get("num_beams", 1) > 1
        if beams and any(settings.get("cancelled") or settings != decodings[0] for settings in decodings):
            raise MLLMError("Beam search decodes a batch with one set of settings; give all prompts the same.")
        if beams and decodings[0].get("seed") is not None:
            raise MLLMError("A seed is for sampling without beams (num_beams=1).")
        groups = list(self._pass.groups(mask, cache, **inputs))
        apart = len(groups) > 1
        if apart and processors:
            raise MLLMError(
                "This language model ignores masks, so prompts of several lengths are decoded apart, and what looks at "
                "a whole batch (contrastive decoding) takes prompts of one length. Give them one by one."
            )
        found: dict[int, list[int]] = {}
        for rows, given, start, sight in groups:
            own = [decodings[row] for row in rows]
            with looking(sight):
                words = self._decoded(own, options, processors, start, None if apart else streamer, given)
            found |= zip(rows, words, strict=True)
        answers = [found[row] for row in range(len(mask))]
        if apart and streamer is not None:  # it takes a token of each row at a time: told once all is there
            self._tell(streamer, answers)
        return answers

    def _tell(self, streamer: Any, answers: Sequence[list[int]]) -> None:
        """Hand a streamer answers that are whole already, as if they came now."""
        streamer.put(torch.empty(len(answers), 0, dtype=torch.long))  # the prompt
        for place in range(max(map(len, answers)) + 1):
            streamer.put(torch.tensor([ids[place] if place < len(ids) else self.eos for ids in answers]))
        streamer.end()

    def _decoded(
        self,
        decodings: Sequence[dict[str, Any]],
        options: dict[str, Any],
        processors: list[Any],
        start: int,
        streamer: Any,
        given: dict[str, Any],
    ) -> list[list[int]]:
        """Decode rows that run together; the first ``start`` ids that come back are not new."""
        beams = options.get("num_beams", 1) > 1
        own = {key: value for key, value in decodings[0].items() if beams and key in decoding.ROW}
        limits = [settings.get("max_new_tokens") for settings in decodings]
        if not beams:
            own = {"max_new_tokens": None if None in limits else max(limit or 0 for limit in limits)}
            if any(decoding.samples(settings) for settings in decodings):
                processors = [*processors, decoding.Sampler(decodings)]
        fixed = {"do_sample": False, "num_beams": 1, "eos_token_id": self.eos, "pad_token_id": self.pad}
        ends = [] if beams else [decoding.RowLimits(decodings, start=start, tokenizer=self.tokenizer)]
        out = self.model.generate(
            generation_config=GenerationConfig(**{**fixed, **options, **own}),
            streamer=streamer,
            logits_processor=LogitsProcessorList(processors),
            stopping_criteria=StoppingCriteriaList(ends),
            tokenizer=self.tokenizer if own.get("stop_strings") else None,
            **given,
        )
        return [self._until_eos(row)[:limit] for row, limit in zip(out[:, start:].tolist(), limits, strict=True)]

    def _end_of_text(self) -> list[int]:
        """Return what the tokenizer puts behind a text, if it puts anything."""
        ids = self.tokenizer("x").input_ids if self.tokenizer is not None else []
        return ids[-1:] if ids and ids[-1] == self.tokenizer.eos_token_id else []

    def _until_eos(self, ids: list[int]) -> list[int]:
        return ids[: ids.index(self.eos)] if self.eos in ids else ids


def whole_embeds(_: nn.Module, args: Any) -> Any:
    """Give the vocabulary's map whole states: of a slice of them torch copies the vocabulary for each row."""
    return (args[0].contiguous(), *args[1:])


def _quantization(kind: str) -> Any:
    from transformers import BitsAndBytesConfig

    # Of every pass of a float32 model: that is how 8 bit works.
    warnings.filterwarnings("ignore", message="MatMul8bitLt: inputs will be cast")
    return BitsAndBytesConfig(load_in_8bit=kind == "8bit", load_in_4bit=kind == "4bit", bnb_4bit_quant_type="nf4")
