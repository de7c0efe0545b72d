"""Build a recipe's models on the meta device, from configurations alone."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from mllm.assembly import Assembly
from mllm.build import build_encoder, build_lm, join
from mllm.config.recipe import Stage
from mllm.errors import MLLMError
from mllm.training.guides import assembly_of


def meta_model(stage: Stage) -> Assembly:
    """Build a stage's model on the meta device: shapes without weights.

    Raises:
        MLLMError: the first thing that does not fit.
    """
    problems: list[str] = []
    model = assembled(stage, problems)
    if model is None:
        raise MLLMError(problems[0])
    return model


def assembled(stage: Stage, problems: list[str]) -> Assembly | None:
    """Build a stage's model on the meta device, the encoder and the language model each by itself.

    Returns:
        The model; None where something does not fit, which is added to ``problems``.
    """
    encoder = lm = None
    with noted(problems):
        spec = assembly_of(stage)
        lm_spec = spec.lm and spec.lm.model_copy(update={"init": "random", "quantize": None})
        spec = spec.model_copy(update={"lm": lm_spec})
        with torch.device("meta"):
            with noted(problems):
                encoder = build_encoder(spec)
            with noted(problems):
                lm = build_lm(spec)
            if (encoder is not None or not spec.encoder) and (lm is not None or not spec.lm):
                return join(spec, encoder=encoder, lm=lm)
    return None


@contextlib.contextmanager
def noted(problems: list[str]) -> Iterator[None]:
    """Add an error that a user can correct to ``problems``, once, and continue."""
    try:
        yield
    except MLLMError as error:
        if str(error) not in problems:
            problems.append(str(error))
