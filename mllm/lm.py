"""The language model: any causal model of `transformers`, frozen, fed with embeddings.

Notable: the model's own forward is used throughout (scaled embeddings, offset positions, soft-capping, sliding
windows), so no family is known by name. Logits are made for the positions asked for only.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LogitsProcessorList,
    StoppingCriteriaList,
)

from mllm import decoding, hub, vocabulary
from mllm.errors import MLLMError
from mllm.prompt import IGNORED


class LanguageModel(nn.Module):
    """A frozen causal language model and its tokenizer.

    Args:
        model: an installed part (``mllm/smollm2-135m``), a hub id or a folder.
        dtype: of the weights; ``auto``: as they are stored.
        quantize: ``8bit`` or ``4bit`` by bitsandbytes.
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
        self.model = hub.load_model(AutoModelForCausalLM, folder, init=init, seed=seed, **options)
        self.model.requires_grad_(False).eval()
        self._folder, self._init = folder, init
        self._accepts = set(inspect.signature(self.model.forward).parameters)
        self._states = "cache" if "cache" in self._accepts else "past_key_values"  # renamed in transformers 5.24

    @property
    def fingerprint(self) -> str:
        """Return what tells these weights from others."""
        return hub.fingerprint(self._folder) if self._init == "pretrained" else hub.tensor_hash(self.model)

    @property
    def dim(self) -> int:
        """Return D_lm, the width of the embeddings."""
        return int(self.model.get_input_embeddings().weight.shape[1])

    @property
    def context(self) -> int | None:
        """Return the most positions the model was made for, or None where it does not say."""
        config = self.model.config.get_text_config()
        return next(
            (getattr(config, key) for key in ("max_position_embeddings", "n_positions") if hasattr(config, key)), None
        )

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
        return list(self.tokenizer(text, add_special_tokens=False, split_special_tokens=not control).input_ids)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids, special tokens left out."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    def embed(self, ids: Tensor) -> Tensor:
        """Return embeddings ``(B, T, D_lm)`` of ids ``(B, T)``."""
        return self.model.get_input_embeddings()(ids)

    def embedding_scale(self) -> float:
        """Return the standard deviation of the embeddings: where a connector's output starts."""
        with torch.no_grad():
            ids = torch.arange(min(4096, self.model.get_input_embeddings().weight.shape[0]))
            return float(self.embed(ids.to(self.model.device)).float().std())

    def logits(self, embeds: Tensor, mask: Tensor, keep: Tensor | None = None, cache: Any = None) -> Tensor:
        """Return logits ``(B, K, V)`` at the positions ``keep (K,)`` of embeddings ``(B, T, D_lm)``.

        Args:
            embeds: the sequence; after a cache, what follows the cached part.
            mask: ``(B, T)``, 1 where there is a token; with a cache it covers the cached part too.
            keep: positions within T; None: all.
            cache: key-value states of what came before; it is added to.
        """
        options = self._inputs(embeds, mask)
        if cache is not None:
            options |= {self._states: cache, "use_cache": True}
        if keep is None:
            return self.model(**options).logits
        if "logits_to_keep" in self._accepts:
            return self.model(**options, logits_to_keep=keep).logits
        return self.model(**options).logits[:, keep]

    def losses(self, embeds: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
        """Return the negative log-likelihood ``(N,)`` of each target, row by row.

        Args:
            embeds: ``(B, T, D_lm)``.
            mask: ``(B, T)``, 1 where there is a token.
            labels: ``(B, T)``, the ids; `mllm.prompt.IGNORED` where there is no target.
        """
        chosen = labels[:, 1:] != IGNORED  # at each position: whether what follows it is a target
        wanted = labels[:, 1:][chosen]  # (N,)
        if not self._separable:
            keep = chosen.any(0).nonzero().squeeze(1)  # (K,)
            logits = self.logits(embeds, mask, keep)[chosen[:, keep]]  # (N, V)
            return cross_entropy(logits.float(), wanted, reduction="none")
        no_cache = {"use_cache": False} if "use_cache" in self._accepts else {}
        output = vocabulary.read(self.model, **self._inputs(embeds, mask), **no_cache)
        hidden = output.last_hidden_state[:, :-1][chosen]  # (N, D_lm)
        return vocabulary.losses(self.model, hidden, wanted, type(output))

    @functools.cached_property
    def _separable(self) -> bool:
        return vocabulary.separable(self.model)

    def _inputs(self, embeds: Tensor, mask: Tensor) -> dict[str, Any]:
        options: dict[str, Any] = {"inputs_embeds": embeds, "attention_mask": mask}
        if "position_ids" in self._accepts:
            options["position_ids"] = positions(mask)[:, -embeds.shape[1] :]
        return options

    @torch.no_grad()
    def prefill(self, embeds: Tensor, mask: Tensor) -> tuple[Any, Tensor]:
        """Return the key-value states of sequences ``(B, T, D_lm)`` and the next token's logits ``(B, V)``."""
        options = {"position_ids": positions(mask)} if "position_ids" in self._accepts else {}
        last = {"logits_to_keep": 1} if "logits_to_keep" in self._accepts else {}
        output = self.model(inputs_embeds=embeds, attention_mask=mask, use_cache=True, **options, **last)
        return output[self._states], output.logits[:, -1]

    def fork(self, cache: Any, rows: Sequence[int] = (0,)) -> Any:
        """Return key-value states of these rows, to be added to; the original stays as it is."""
        new = copy.copy(cache)
        new.layers = [copy.copy(layer) for layer in cache.layers]
        new.reorder_cache(torch.tensor(rows, device=self.model.device))  # makes new tensors
        return new

    def generate(
        self,
        mask: Tensor,
        decodings: Sequence[dict[str, Any]],
        *,
        cache: Any = None,
        streamer: Any = None,
        **inputs: Tensor,
    ) -> list[list[int]]:
        """Return the new ids of each sequence, by `transformers`' own decoding.

        Args:
            mask: ``(B, T)``.
            decodings: each row's settings: fields of `transformers.GenerationConfig`, ``seed``, ``logits_processor``.
            cache: key-value states of the first positions.
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
        own = {key: value for key, value in decodings[0].items() if beams and key in decoding.ROW}
        if own.pop("seed", None) is not None:
            raise MLLMError("A seed is for sampling without beams (num_beams=1).")
        start = inputs["input_ids"].shape[1] if "input_ids" in inputs else 0
        limits = [settings.get("max_new_tokens") for settings in decodings]
        if not beams:
            own = {"max_new_tokens": None if None in limits else max(limit or 0 for limit in limits)}
            if any(decoding.samples(settings) for settings in decodings):
                processors.append(decoding.Sampler(decodings))
        config = GenerationConfig(
            **{"do_sample": False, "eos_token_id": self.eos, "pad_token_id": self.pad, **options, **own}
        )
        ends = [] if beams else [decoding.RowLimits(decodings, start=start, tokenizer=self.tokenizer)]
        out = self.model.generate(
            attention_mask=mask,
            generation_config=config,
            streamer=streamer,
            logits_processor=LogitsProcessorList(processors),
            stopping_criteria=StoppingCriteriaList(ends),
            tokenizer=self.tokenizer if own.get("stop_strings") else None,
            **{self._states: cache},
            **inputs,
        )
        return [self._until_eos(row)[:limit] for row, limit in zip(out[:, start:].tolist(), limits, strict=True)]

    def _until_eos(self, ids: list[int]) -> list[int]:
        return ids[: ids.index(self.eos)] if self.eos in ids else ids


def positions(mask: Tensor) -> Tensor:
    """Return position ids ``(B, T)`` that count a row's own tokens, so that padding on the left moves nothing."""
    return (mask.long().cumsum(-1) - 1).clamp(min=0)


def _quantization(kind: str) -> Any:
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_8bit=kind == "8bit", load_in_4bit=kind == "4bit")
