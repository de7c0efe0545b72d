"""Compare an engine's language model with ours: an answer to a text's ids has to be that to its embeddings."""

from __future__ import annotations

from typing import Protocol

from mllm.engines.base import Request, Source
from mllm.errors import MLLMError
from mllm.lms.decoding import Decoding

TEXT = "The quick brown fox, 1234 (naïve) 日本: which animals are named here? They are"
TOKENS = 8


class Answers(Protocol):
    """What answers a request: an engine, or one of its servers."""

    label: str

    async def answer(self, request: Request) -> list[int]:
        """Return the ids of a request's answer."""


async def check_embeddings(engine: Answers, source: Source) -> None:
    """Check that an engine answers a text's ids as it answers their embeddings of our table.

    Raises:
        MLLMError: it does not, or refuses one of them: its embedding table is another one.
    """
    ids = source.tokenize(TEXT)
    ids = ids[: (source.context or len(ids) + TOKENS) - TOKENS]
    decoding = Decoding(max_new_tokens=TOKENS, do_sample=False)
    by_ids, by_embeddings = [
        await engine.answer(Request(prompt, decoding, [], lambda new: None)) for prompt in (ids, source.embed(ids))
    ]
    if by_ids != by_embeddings:
        raise MLLMError(
            f"The engine {engine.label} has another language model than this run, {source.name}: it answers a text's "
            f"ids by {by_ids}, and their embeddings here by {by_embeddings}. Start it with {source.name}."
        )
