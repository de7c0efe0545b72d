"""Encode texts alone by a text tower such as BERT, which may train: what a connector makes of words, without images."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

from mllm.capabilities import EncodesTexts
from mllm.errors import MLLMError
from mllm.hub import loading as hub
from mllm.hub.fingerprints import fingerprint, tensor_hash
from mllm.hub.identity import of_language_model
from mllm.media.texts import TextSource
from mllm.registry import Count, Share


class TextTower(EncodesTexts):
    """A text encoder of `transformers` (BERT, MiniLM, ...); its features are one vector of a text (P-Former's encoder).

    Args:
        model: an installed part, a Hub id or a folder.
        pool: ``first``: the state of the first token (BERT's CLS); ``mean``: the mean over all tokens.
        mask: the share of the tokens, special ones apart, that are replaced by the mask token, drawn anew each time;
            while the encoder trains alone.
        length: tokens of a text; a longer one is truncated.
        init: ``random`` keeps the architecture and initializes the weights at random (a control).
        seed: of the random weights.
        trust_remote_code: run Python code from the model's repository.

    Raises:
        MLLMError: the model has an encoder and a decoder, or there is no token to mask with.
    """

    grid = None
    num_patches = 1
    reads_images = False
    texts_alone = True

    def __init__(
        self,
        *,
        model: str,
        pool: Literal["first", "mean"] = "first",
        mask: Share = 0.0,
        length: Count = 64,
        init: Literal["pretrained", "random"] = "pretrained",
        seed: int = 0,
        trust_remote_code: bool = False,
    ) -> None:
        super().__init__()
        if pool not in ("first", "mean"):
            raise MLLMError(f"encoder.pool is {pool!r}: expected first or mean.")
        self._folder, self._code = hub.resolve(model, group="lms"), {"trust_remote_code": trust_remote_code}
        self.tokenizer = hub.load_processor(AutoTokenizer, self._folder, trust_remote_code=trust_remote_code)
        self.model = hub.load_model(
            AutoModel, self._folder, init=init, seed=seed, trust_remote_code=trust_remote_code, dtype="auto"
        )
        self.requires_grad_(False).eval()
        if self.model.config.is_encoder_decoder:
            raise MLLMError(f"{model} has an encoder and a decoder; expected a text encoder such as mllm/minilm.")
        if mask and self.tokenizer is not None and self.tokenizer.mask_token_id is None:
            raise MLLMError(f"encoder.mask is {mask}, and the tokenizer of {model} has no mask token. Leave it out.")
        self.pool, self.mask = pool, mask
        self.dim, self.length = int(self.model.config.hidden_size), length
        self.shape = (length,)
        self._hash = tensor_hash(self.model) if init == "random" and self.model.device.type != "meta" else None

    @functools.cached_property
    def fingerprint(self) -> str:
        """Return the fingerprint of weights, configuration and tokenizer."""
        weights = self._hash or fingerprint(self._folder)
        return of_language_model(weights, self._folder, self.tokenizer, **self._code)

    def settings(self) -> dict[str, Any]:
        """Return the settings that, with the weights, determine the features."""
        return {"pool": self.pool, "length": self.length}

    def open(self, piece: Any) -> TextSource:
        """Return a text as it is.

        Raises:
            MLLMError: it is an image.
        """
        if not isinstance(piece, TextSource):
            raise MLLMError(
                "This encoder encodes texts alone, and was given an image. Train on sources with 'see: text', and "
                "choose an encoder of images (encoder.type=dual-encoder, run) to answer for images."
            )
        return piece

    def preprocess(self, items: Sequence[TextSource]) -> Tensor:
        """Return ids ``(B, T)`` of texts, padded to the longest text that is read."""
        texts = [item.text for item in items]
        longest = min(self.length, self.tokenizer.model_max_length, self.model.config.max_position_embeddings)
        ids: Tensor = self.tokenizer(
            texts, padding="max_length", truncation=True, max_length=longest, return_tensors="pt"
        )["input_ids"]
        return ids

    def forward(self, pixels: Tensor) -> Tensor:
        """Return features ``(B, 1, D_vis)`` of ids ``(B, T)``."""
        ids = pixels.long()
        attended = ids != (self.model.config.pad_token_id or 0)
        states = self.model(input_ids=self._masked(ids), attention_mask=attended.long()).last_hidden_state
        if self.pool == "first":
            first: Tensor = states[:, :1]
            return first
        weight = attended.unsqueeze(-1).to(states)
        mean: Tensor = (states * weight).sum(1, keepdim=True) / weight.sum(1, keepdim=True).clamp(min=1)
        return mean

    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        """Return features ``(N, 1, D_vis)`` of texts."""
        features: Tensor = self(self.preprocess([TextSource(text) for text in texts]).to(self.model.device))
        return features

    def _masked(self, ids: Tensor) -> Tensor:
        """Return ids of which, while the encoder trains, some are replaced by the mask token."""
        if not (self.training and self.mask):
            return ids
        special = torch.isin(ids, torch.tensor(self.tokenizer.all_special_ids, device=ids.device))
        drawn = torch.rand(ids.shape, device=ids.device) < self.mask
        return ids.masked_fill(drawn & ~special, self.tokenizer.mask_token_id)
