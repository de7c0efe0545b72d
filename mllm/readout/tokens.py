"""List the new tokens whose states heads read, and those that stand for an image in an answer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch

from mllm.capabilities import ConditionHead, ImageTokenHead
from mllm.config.parts import HeadSpec
from mllm.errors import MLLMError
from mllm.model import Model
from mllm.registry import lookup, made
from mllm.slots import Head, ImageDecoder


def every_token(tokens: Sequence[str], heads: Iterable[Head]) -> list[str]:
    """Return the recipe's tokens and the heads' tokens, each once."""
    return list(dict.fromkeys([*tokens, *(token for head in heads for token in head.tokens)]))


def image_tokens(model: Model) -> tuple[str, ...]:
    """Return the tokens that stand for an image, in order: those of the head with the most.

    Raises:
        MLLMError: no head shows images, or two of them read different tokens.
    """
    heads = model.find_all(ImageTokenHead)
    if not heads:
        raise MLLMError(
            "This model has no head that shows images. Add one: heads: [{type: retrieval}] (docs/retrieval.md)."
        )
    tokens = max((head.tokens for head in heads.values()), key=len)
    for path, head in heads.items():
        if not {*head.tokens} <= {*tokens}:
            raise MLLMError(
                f"The head {path} reads {head.tokens[0]!r}, and an image's tokens are {[*tokens]}. Set the head's "
                "token to one of them."
            )
    return tokens


def can_draw(model: Model) -> bool:
    """Whether the model can generate images: it has a head that makes conditions, and an image decoder."""
    return model.has(ConditionHead, ImageDecoder)


def heads_on_meta(specs: Sequence[HeadSpec]) -> Mapping[str, Head]:
    """Return heads by name on the meta device, to check their contracts before anything is loaded."""
    with torch.device("meta"):
        return {
            spec.name: made(lookup("heads", spec.type), f"head {spec.type}", lm_dim=8, vis_dim=8, **spec.options())
            for spec in specs
        }
