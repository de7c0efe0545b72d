"""Choose the runner of a language model by what the model can do."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from mllm.errors import MLLMError
from mllm.lms.runners.base import Runner
from mllm.lms.runners.cached import CachedRunner
from mllm.lms.runners.encoder_decoder import EncoderDecoderRunner
from mllm.lms.runners.probes import can_run
from mllm.lms.runners.unpadded import UnpaddedRunner


def choose_runner(model: Any, end: Sequence[int]) -> Runner:
    """Return the runner of a model.

    Args:
        model: a language model of `transformers`.
        end: ids that the tokenizer appends to a text.

    Raises:
        MLLMError: the model takes no embeddings.
    """
    if "inputs_embeds" not in inspect.signature(model.forward).parameters:
        raise MLLMError(
            f"{type(model).__name__} takes no embeddings as input (inputs_embeds), so no image can be put into it. "
            "Take another language model."
        )
    if model.config.is_encoder_decoder:
        return EncoderDecoderRunner(model, end)
    cached = CachedRunner(model)
    if model.device.type == "meta" or (cached.accepts_cache and can_run(cached)):
        return cached
    return UnpaddedRunner(model)
