"""Sound: any audio model that `transformers` loads by its Auto classes (Whisper's encoder, HuBERT, wav2vec2, ...)."""

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
from mllm.encoders.truncate import cut, until
from mllm.errors import MLLMError
from mllm.hub import loading as hub
from mllm.media.sounds import Sound, open_sound


class AudioModel(PretrainedEncoder):
    """An audio model of `transformers`, cut after what is used. A sound is padded with silence to one length.

    Args:
        model: a hub id or a folder.
        layer: index into the hidden states; None: the model's own output.
        select: ``patches`` or ``all``: a feature for each frame of time; ``pooled``: their mean.
        seconds: the length every sound is padded to, and may have; None: the model's own (Whisper: 30), else 10.
        init: ``random`` cacheable the architecture and draws new weights (a control).
        seed: of the random weights.

    Raises:
        MLLMError: it cannot be loaded, has no such layer, or takes no sound of that length.
    """

    grid = None

    def __init__(
        self,
        *,
        model: str,
        layer: int | None = None,
        select: Literal["patches", "pooled", "all"] = "patches",
        seconds: float | None = None,
        init: Literal["pretrained", "random"] = "pretrained",
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.layer, self.select = layer, select
        folder = hub.resolve(model, group="encoders")
        self._load = partial(hub.load_model, AutoModel, folder, init=init, seed=seed)
        self.model = _tower(self._load()).requires_grad_(False).eval()
        self.processor = hub.load_processor(AutoFeatureExtractor, folder)
        self.rate = int(self.processor.sampling_rate)
        own: Any = getattr(self.processor, "chunk_length", 10)
        self.seconds = float(own if seconds is None else seconds)
        self.set_fingerprint(folder, init)
        takes = inspect.signature(self.model.forward).parameters
        self._masks = "attention_mask" in takes and bool(getattr(self.processor, "return_attention_mask", False))
        self._states = {} if layer is None else {"output_hidden_states": True}
        with torch.device("cpu"):  # on paper too: the features are computed by numpy
            blank = self.preprocess([Sound(np.zeros(self.rate, dtype=np.float32), self.rate)])
        self.shape = tuple(blank.shape[1:])
        try:
            raw, cuts = cut(self.model, lambda: self._raw(blank))
        except MLLMError:
            raise
        except Exception as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise MLLMError(
                f"The encoder {model!r} does not take {self.seconds:g} seconds of sound: {reason}"
            ) from error
        if cuts:
            self._states = {}
        self.num_patches, self.dim = (1 if select == "pooled" else raw.shape[1]), raw.shape[2]

    def settings(self) -> dict[str, Any]:
        """Return what, beside the weights, decides the features."""
        own = {"layer": self.layer, "select": self.select, "seconds": self.seconds}
        return {**own, "processor": self.processor.to_dict()}

    def open(self, piece: Any) -> Sound:
        """Return a sound at the model's rate."""
        return open_sound(piece, self.rate, self.seconds)

    def preprocess(self, items: Sequence[Sound]) -> Tensor:
        """Return what the model's own feature extractor makes of sounds: a spectrogram, or samples ``(B, N)``."""
        length = round(self.seconds * self.rate)
        made = self.processor(
            [sound.samples[:length] for sound in items],
            sampling_rate=self.rate,
            padding="max_length",
            max_length=length,
            truncation=True,
            return_tensors="pt",
        )
        return made[self.processor.model_input_names[0]]

    def forward(self, pixels: Tensor) -> Tensor:
        """Return features ``(B, P, D_vis)`` of what `preprocess` returned."""
        features = until(lambda: self._raw(pixels))
        return features.mean(1, keepdim=True) if self.select == "pooled" else features

    def _raw(self, sound: Tensor) -> Tensor:
        sound = sound.to(self.model.device, self.model.dtype)
        heard = self._masks and sound.ndim == 2 and not sound.is_meta  # on paper, no mask can be looked into
        mask = {"attention_mask": _heard(sound)} if heard else {}
        output = self.model(sound, **mask, **self._states)
        return output.last_hidden_state if self.layer is None else layer_of(output.hidden_states, self.layer)


def _tower(model: Any) -> Any:
    """Return the encoder of an encoder-decoder, the audio tower of a model with several, or the model itself."""
    return model.get_encoder() if model.config.is_encoder_decoder else model.get_encoder(modality="audio")


def _heard(samples: Tensor) -> Tensor:
    """Return the mask ``(B, N)`` of samples up to the last that is not the silence of the padding."""
    left = (samples != 0).flip(1).cumsum(1).flip(1)  # how many there are from here on
    return (left > 0).long()
