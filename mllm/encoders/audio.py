"""Encode sounds with any audio model that the Auto classes of `transformers` load (Whisper, HuBERT, wav2vec2)."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from transformers import AutoFeatureExtractor, AutoModel

from mllm.encoders.base import PretrainedEncoder, layer_of
from mllm.encoders.truncate import run_truncated, truncate
from mllm.errors import MLLMError
from mllm.hub import identity
from mllm.hub import loading as hub
from mllm.media.sounds import Sound, open_sound


class AudioModel(PretrainedEncoder):
    """An audio model of `transformers`, truncated after the layer that is used. Sounds are padded with silence.

    Args:
        model: a Hub id or a folder.
        layer: an index into the hidden states; None: the model's last hidden state.
        select: ``patches`` or ``all``: one feature per time frame; ``pooled``: their mean.
        seconds: the length that sounds are padded to, and their maximum; None: the model's (Whisper: 30), else 10.
        init: ``random`` uses the architecture with randomly initialized weights (a control).
        seed: the seed of the random weights.
        trust_remote_code: run Python code from the model's repository.

    Raises:
        MLLMError: the model cannot be loaded, has no such layer, or does not accept sounds of that length.
    """

    grid = None
    reads_images = False

    def __init__(
        self,
        *,
        model: str,
        layer: int | None = None,
        select: Literal["patches", "pooled", "all"] = "patches",
        seconds: float | None = None,
        init: Literal["pretrained", "random"] = "pretrained",
        seed: int = 0,
        trust_remote_code: bool = False,
    ) -> None:
        super().__init__()
        self.layer, self.select = layer, select
        folder = hub.resolve(model, group="encoders")
        code: Any = {"trust_remote_code": trust_remote_code}
        self._load = partial(hub.load_model, AutoModel, folder, init=init, seed=seed, **code)
        self.model = _tower(self._load()).requires_grad_(False).eval()
        self.processor = hub.load_processor(AutoFeatureExtractor, folder, **code)
        self.rate = int(self.processor.sampling_rate)
        default_seconds: Any = getattr(self.processor, "chunk_length", 10)
        self.seconds = float(default_seconds if seconds is None else seconds)
        self.set_fingerprint(
            folder,
            init,
            configuration=identity.configuration(self.model.config),
            preprocessing=identity.preprocessing(self.processor),
        )
        parameters = inspect.signature(self.model.forward).parameters
        self._masks = "attention_mask" in parameters and bool(getattr(self.processor, "return_attention_mask", False))
        self._states = {} if layer is None else {"output_hidden_states": True}
        with torch.device("cpu"):  # on the meta device too: the feature extractor computes with numpy
            blank = self.preprocess([Sound(np.zeros(self.rate, dtype=np.float32), self.rate)])
        self.shape = tuple(blank.shape[1:])
        try:
            raw, truncated = truncate(self.model, lambda: self._raw(blank))
        except MLLMError:
            raise
        except Exception as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise MLLMError(
                f"The encoder {model!r} does not accept {self.seconds:g} seconds of sound: {reason} Set "
                "encoder.seconds to a length that it accepts."
            ) from error
        if truncated:
            self._states = {}
        self.num_patches, self.dim = (1 if select == "pooled" else raw.shape[1]), raw.shape[2]

    def settings(self) -> dict[str, Any]:
        """Return the settings that, with the weights, determine the features."""
        settings = {"layer": self.layer, "select": self.select, "seconds": self.seconds}
        return {**settings, "processor": self.processor.to_dict()}

    def open(self, piece: Any) -> Sound:
        """Return a sound at the model's sampling rate."""
        return open_sound(piece, self.rate, self.seconds)

    def preprocess(self, items: Sequence[Sound]) -> Tensor:
        """Return the output of the model's feature extractor: spectrograms, or samples ``(B, N)``."""
        length = round(self.seconds * self.rate)
        inputs = self.processor(
            [sound.samples[:length] for sound in items],
            sampling_rate=self.rate,
            padding="max_length",
            max_length=length,
            truncation=True,
            return_tensors="pt",
        )
        return inputs[self.processor.model_input_names[0]]

    def forward(self, pixels: Tensor) -> Tensor:
        """Return features ``(B, P, D_vis)`` of the output of `preprocess`."""
        features = run_truncated(lambda: self._raw(pixels))
        return features.mean(1, keepdim=True) if self.select == "pooled" else features

    def _raw(self, sound: Tensor) -> Tensor:
        sound = sound.to(self.model.device, self.model.dtype)
        masked = self._masks and sound.ndim == 2 and not sound.is_meta  # a mask needs values
        mask = {"attention_mask": _padding_mask(sound)} if masked else {}
        output = self.model(sound, **mask, **self._states)
        return output.last_hidden_state if self.layer is None else layer_of(output.hidden_states, self.layer)


def _tower(model: Any) -> Any:
    """Return the encoder of an encoder-decoder, the audio tower of a multimodal model, or the model itself."""
    return model.get_encoder() if model.config.is_encoder_decoder else model.get_encoder(modality="audio")


def _padding_mask(samples: Tensor) -> Tensor:
    """Return the attention mask ``(B, N)``: 1 up to the last sample that is not zero, 0 for the padding after it."""
    remaining = (samples != 0).flip(1).cumsum(1).flip(1)  # the number of non-zero samples from each position on
    return (remaining > 0).long()
