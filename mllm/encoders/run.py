"""Encode with another run: its encoder and its connector, both frozen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from mllm.capabilities import SentenceModel
from mllm.encoders.texts import EncodesTexts
from mllm.errors import MLLMError
from mllm.media.images import ImageSource
from mllm.media.texts import TextSource
from mllm.model import Model
from mllm.slots import Connector


class RunEncoder(EncodesTexts):
    """The visual tokens that another run's connector makes of an image, as features ``(B, P, D_vis)``.

    A run with a sentence encoder (``mllm train emoji-scorer``) has images and sentences in one space: its features are
    one vector of length 1, that of its scorer (`mllm.scorers.aligned`), and it encodes texts. Any other run has one
    feature for each visual token of a whole image, and encodes texts if its encoder does.

    Args:
        model: the model; in a recipe, the path of its run.
        seed: unused.

    Raises:
        MLLMError: the run has no connector or no language model, or its images take different numbers of tokens.
    """

    def __init__(self, *, model: Model, seed: int = 0) -> None:
        super().__init__()
        if not model.has(Connector) or model.lm is None:
            raise MLLMError(
                "encoder.model is a run without a connector to a language model: expected one that has both, whose "
                "visual tokens are the features. Name another run."
            )
        if model.joint:
            raise MLLMError(
                "encoder.model is a run whose images take different numbers of tokens by their size, and an encoder "
                "gives as many features for each. Name a run with another encoder."
            )
        self.encoder, self.connector = model.encoder, model.connector
        self.lm = model.lm if model.has(SentenceModel) else None  # another one reads visual tokens, and makes none
        self.dim, self._fingerprint = int(model.lm.dim), model.fingerprint
        self.num_patches = self.connector.num_tokens if self.lm is None else 1
        self.grid = self.connector.token_grid if self.lm is None else None
        self.reads_images, self.reads_videos = self.encoder.reads_images, self.encoder.reads_videos
        self.shape = self.encoder.shape

    @property
    def fingerprint(self) -> str:
        """Return the fingerprint of the run: of its trained tensors and frozen parts."""
        return self._fingerprint

    def settings(self) -> dict[str, Any]:
        """Return the settings of the run's encoder."""
        return {"encoder": self.encoder.settings()}

    def open(self, piece: Any) -> Any:
        """Return an image as the run's encoder opens it; a text is returned as it is.

        Raises:
            MLLMError: a text, which the run does not encode.
        """
        if isinstance(piece, TextSource) and self.lm is None and not isinstance(self.encoder, EncodesTexts):
            raise MLLMError(
                "encoder.model is a run that encodes no texts: expected one with lm.type=sentences (mllm train "
                "emoji-scorer), or with an encoder that encodes texts. Name such a run, or leave out 'see: text'."
            )
        return piece if isinstance(piece, TextSource) else self.encoder.open(piece)

    def key(self, source: ImageSource) -> str:
        """Return the key that the run's encoder gives an image, and a text its own."""
        return source.key() if isinstance(source, TextSource) else str(self.encoder.key(source))

    def pixels(self, piece: Any) -> int:
        """Return the number of pixels that `open` decodes."""
        return int(self.encoder.pixels(piece))

    def preprocess(self, items: Sequence[Any]) -> Tensor:
        """Return the input of the run's encoder."""
        pixels: Tensor = self.encoder.preprocess(items)
        return pixels

    def prepared(self, items: Sequence[Any]) -> Tensor:
        """Return the input of the run's encoder, in as few bytes as possible."""
        pixels: Tensor = self.encoder.prepared(items)
        return pixels

    @torch.no_grad()
    def forward(self, pixels: Tensor) -> Tensor:
        """Return features ``(B, P, D_vis)``."""
        return self._connected(self.encoder(pixels))

    @torch.no_grad()
    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        """Return features ``(N, P, D_vis)`` of texts."""
        if self.lm is not None:
            return self.lm.sentences(texts).float()[:, None]
        return self._connected(self.encoder.encode_texts(texts))

    def _connected(self, features: Tensor) -> Tensor:
        tokens: Tensor = self.connector(features)
        return tokens if self.lm is None else normalize(tokens.float().mean(1, keepdim=True), dim=-1)
