"""Encode whole sentences as vectors: a frozen text encoder in the place of the language model; it generates no text."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer

from mllm.errors import MLLMError
from mllm.hub import loading as hub
from mllm.hub.fingerprints import fingerprint, tensor_hash
from mllm.hub.identity import of_language_model
from mllm.system import checked_text

_BATCH = 64


class SentenceEncoder(nn.Module):
    """A text encoder of `transformers` with mean pooling of its last hidden states (Sentence-BERT, arXiv:1908.10084).

    Args:
        model: an installed part (``mllm/minilm``), a hub id or a folder.
        dtype: of the weights; ``auto``: as they are stored.
        quantize: not possible here.
        init: ``random`` keeps the architecture and initializes the weights at random (a control).
        seed: of the random weights.
        trust_remote_code: run Python code from the model's repository.

    Attributes:
        speaks: False: it generates no text.

    Raises:
        MLLMError: ``quantize`` is set, or the model has an encoder and a decoder.
    """

    speaks = False
    context = None  # longer texts are truncated

    def __init__(
        self,
        *,
        model: str,
        dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
        quantize: Mapping[str, Any] | str | None = None,
        init: Literal["pretrained", "random"] = "pretrained",
        seed: int = 0,
        trust_remote_code: bool = False,
    ) -> None:
        super().__init__()
        if quantize is not None:
            raise MLLMError("lm.quantize is given: a sentence encoder cannot be quantized. Leave it out.")
        self._folder, self._init = hub.resolve(model, group="lms"), init
        self._code = code = {"trust_remote_code": trust_remote_code}
        self.tokenizer = hub.load_processor(AutoTokenizer, self._folder, **code)
        options: dict[str, Any] = {"dtype": dtype if dtype == "auto" else getattr(torch, dtype)}
        self.model = hub.load_model(AutoModel, self._folder, init=init, seed=seed, **code, **options)
        if self.model.config.is_encoder_decoder:
            raise MLLMError(f"{model} has an encoder and a decoder; expected a text encoder such as mllm/minilm.")
        self.model.requires_grad_(False).eval()
        if init == "random" and self.model.device.type != "meta":
            _ = self.fingerprint  # before its weights are converted or trained

    @functools.cached_property
    def fingerprint(self) -> str:
        """Return the fingerprint of weights, configuration and tokenizer."""
        weights = fingerprint(self._folder) if self._init == "pretrained" else tensor_hash(self.model)
        return of_language_model(weights, self._folder, self.tokenizer, **self._code)

    @property
    def dim(self) -> int:
        """Return the width of the vectors, which the connector maps to."""
        return int(self.model.config.hidden_size)

    def sentences(self, texts: Sequence[str]) -> Tensor:
        """Return vectors ``(N, D_lm)`` of length 1; a text that is too long is truncated."""
        texts = [checked_text(text) for text in texts]
        batches = [texts[start : start + _BATCH] for start in range(0, len(texts), _BATCH)]
        return torch.cat([self._vectors(list(batch)) for batch in batches])

    def _vectors(self, texts: list[str]) -> Tensor:
        longest = min(self.tokenizer.model_max_length, self.model.config.max_position_embeddings)
        tokens = self.tokenizer(texts, padding=True, truncation=True, max_length=longest, return_tensors="pt")
        tokens = tokens.to(self.model.device)
        states = self.model(**tokens).last_hidden_state  # (N, T, D_lm)
        mask = tokens["attention_mask"].unsqueeze(-1).to(states)
        return nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)
