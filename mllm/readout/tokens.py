"""The tokens that heads read."""

from __future__ import annotations

from typing import Any

from mllm.errors import MLLMError

HEAD = "retrieval"


def token_id(model: Any) -> int:
    """Return the id of the retrieval head's token.

    Raises:
        MLLMError: the model has no such head, or its tokens do not hold the head's.
    """
    if HEAD not in model.heads:
        raise MLLMError("This model has no retrieval head. Add heads: [{type: retrieval}] and tokens: ['[RET]'].")
    known_tokens(model)
    return int(model.lm.new_tokens[model.heads[HEAD].token])


def known_tokens(model: Any) -> tuple[str, ...]:
    """Return the tokens that stand for an image, held against the language model's.

    Raises:
        MLLMError: no head reads tokens, or its tokens are not the language model's, or those of other heads.
    """
    tokens = model.image_tokens
    if tokens is None:
        raise MLLMError("This model has no head that shows images. Add one, and its tokens (docs/retrieval.md).")
    for name, head in model.heads.items():
        own = getattr(head, "tokens", None) or [getattr(head, "token", tokens[0])]
        if missing := [token for token in own if token not in model.lm.new_tokens]:
            known = [*model.lm.new_tokens]
            raise MLLMError(f"The head {name} reads the token {missing[0]!r}, and tokens is {known}. Add it there.")
        if not {*own} <= {*tokens}:
            raise MLLMError(f"The head {name} reads {own[0]!r}, and an image's tokens are {[*tokens]}: set its token.")
    return tuple(tokens)
