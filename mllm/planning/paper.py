"""Build a recipe's models on the meta device, from configurations alone."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from mllm.assembly import Assembly
from mllm.build import build_encoder, build_lm, join
from mllm.config.recipe import Stage
from mllm.errors import MLLMError


def on_paper(stage: Stage) -> Assembly:
    """Build a stage's model on the meta device: shapes without weights.

    Raises:
        MLLMError: the first thing that does not fit.
    """
    found: list[str] = []
    model = assembled(stage, found)
    if model is None:
        raise MLLMError(found[0])
    return model


def assembled(stage: Stage, found: list[str]) -> Assembly | None:
    """Build on the meta device, noting what fails: the encoder and the language model each on their own."""
    encoder = lm = None
    with noted(found):
        spec = stage.assembly
        lm_spec = spec.lm and spec.lm.model_copy(update={"init": "random", "quantize": None})
        spec = spec.model_copy(update={"lm": lm_spec})
        with torch.device("meta"):
            with noted(found):
                encoder = build_encoder(spec)
            with noted(found):
                lm = build_lm(spec)
            if (encoder is not None or not spec.encoder) and (lm is not None or not spec.lm):
                return join(spec, encoder=encoder, lm=lm)
    return None


@contextlib.contextmanager
def noted(found: list[str]) -> Iterator[None]:
    """Note an error a user can mend, and go on."""
    try:
        yield
    except MLLMError as error:
        found.append(str(error))
