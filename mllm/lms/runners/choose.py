"""Choose how a language model is run, by what it can do."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from mllm.errors import MLLMError
from mllm.lms.runners.cached import Cached
from mllm.lms.runners.encoder_decoder import EncoderDecoder
from mllm.lms.runners.unpadded import Apart


def choose_runner(model: Any, end: Sequence[int]) -> Any:
    """Return how a model is run.

    Raises:
        MLLMError: it takes no embeddings.
    """
    if "inputs_embeds" not in inspect.signature(model.forward).parameters:
        raise MLLMError(
            f"{type(model).__name__} takes no embeddings as input (inputs_embeds), so no picture can be put into it. "
            "Take another language model."
        )
    if model.config.is_encoder_decoder:
        return EncoderDecoder(model, end)
    cached = Cached(model)
    return cached if model.device.type == "meta" or cached.can_run() else Apart(model)
