"""Turn text into ids and back, new tokens included."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from mllm.errors import MLLMError
from mllm.lms.whole_text import WholeText
from mllm.prompts.pieces import Part, Token
from mllm.system import checked_text


class TextTokenizer:
    """A tokenizer of `transformers`, the new tokens that it does not know, and the ids that end an answer.

    Args:
        tokenizer: of `transformers`; None where a model is planned without its files.
        model: the language model of `transformers`: an id without an embedding in it is never used, and its
            ``generation_config`` names further ids that end an answer. None: the tokenizer stands alone.

    Attributes:
        turn_end: the id that ends a turn in the chat template, where the model uses one.
    """

    def __init__(self, tokenizer: Any, model: Any = None) -> None:
        self.tokenizer = tokenizer
        self.turn_end: int | None = None
        self._rows = None if model is None else int(model.get_input_embeddings().weight.shape[0])
        ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
        ends = [] if ends is None else ends if isinstance(ends, list | tuple) else [ends]
        self._configured_ends = [int(end) for end in ends if self._has_row(end)]
        self._new_tokens: dict[str, int] = {}

    @property
    def new_tokens(self) -> dict[str, int]:
        """Return name -> id of the tokens that were added to the language model."""
        return self._new_tokens

    @new_tokens.setter
    def new_tokens(self, tokens: dict[str, int]) -> None:
        if self.tokenizer is not None:
            clash = {token: word for word, token in self.tokenizer.get_vocab().items() if token in tokens.values()}
            if clash:
                token, word = next(iter(clash.items()))
                raise MLLMError(
                    f"tokens: the tokenizer gives the id {token} to {word!r}, for which the language model has no "
                    "embedding, and a new token would have the same id. Take the tokenizer's files as they came with "
                    "the language model, or resize its embeddings."
                )
        self._new_tokens = tokens

    @functools.cached_property
    def _around(self) -> tuple[list[int], list[int]]:
        """Return the ids that the tokenizer puts before and after every text."""
        whole, text = (list(self.tokenizer("x", add_special_tokens=added).input_ids) for added in (True, False))
        starts = range(len(whole) - len(text) + 1)
        start = next((start for start in starts if whole[start : start + len(text)] == text), 0)
        return whole[:start], whole[start + len(text) :]

    @property
    def bos(self) -> list[int]:
        """Return the ids that every sequence starts with: those that the tokenizer puts before a text."""
        return self._checked(self._around[0])

    @property
    def eos(self) -> int:
        """Return the id that ends an answer: the tokenizer's EOS token, or else one of the model's configuration."""
        eos = self.tokenizer.eos_token_id
        ids = [*([int(eos)] if eos is not None and self._has_row(eos) else []), *self._configured_ends]
        if not ids:
            raise MLLMError("This language model's tokenizer has no end-of-sequence token, so no answer can end.")
        return ids[0]

    @property
    def ends(self) -> list[int]:
        """Return the ids that end an answer, of the tokenizer, the model's configuration and the chat template."""
        turn = [] if self.turn_end is None else [self.turn_end]
        return list(dict.fromkeys([self.eos, *self._configured_ends, *turn]))

    @property
    def pad(self) -> int:
        """Return the padding id; padding is always masked, so any id that has an embedding will do."""
        pads = [self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, *self._configured_ends, 0]
        return next(int(pad) for pad in pads if pad is not None and self._has_row(pad))

    @property
    def end_of_text(self) -> list[int]:
        """Return the ids that the tokenizer appends to a text, if it appends any."""
        return self._checked(self._around[1]) if self.tokenizer is not None else []

    @functools.cached_property
    def whole_text(self) -> WholeText:
        """Return what tokenizes texts and images together."""
        return WholeText(self.tokenizer)

    def tokenize(self, text: str, *, control: bool = False) -> list[int]:
        """Return the ids of a text without added special tokens.

        ``control``: control words in it are recognised. They are special tokens, added ones such as ``<think>``, and
        new ones.

        Raises:
            MLLMError: the text has a lone surrogate, or a token has no embedding.
        """
        if not control:
            ids = list(self.tokenizer(checked_text(text), add_special_tokens=False).input_ids)
            if not self.whole_text.holds_control(ids):
                return self._checked(ids)
        tokens = self.tokenize_parts([Part(text, "all" if control else "none")])
        return [token.id for token in tokens if token.id is not None]

    def tokenize_parts(self, parts: Sequence[Part]) -> list[Token]:
        """Return the tokens of texts and images that stand next to each other, tokenized as a whole.

        Raises:
            MLLMError: a text has a lone surrogate, or a token has no embedding.
        """
        for part in parts:
            checked_text(part.text or "")
        tokens = self.whole_text.tokens(parts, self.new_tokens)
        self._checked([token.id for token in tokens if token.id is not None])
        return tokens

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids, special tokens left out."""
        new = set(self.new_tokens.values())
        return str(self.tokenizer.decode([i for i in ids if i not in new], skip_special_tokens=True))

    def until_end(self, ids: list[int]) -> list[int]:
        """Return the ids before the first one that ends an answer."""
        ends = set(self.ends)
        return ids[: next((index for index, token in enumerate(ids) if token in ends), len(ids))]

    def _has_row(self, token: int) -> bool:
        return self._rows is None or token < self._rows

    def _checked(self, ids: list[int]) -> list[int]:
        """Return ids that all have an embedding.

        Raises:
            MLLMError: one has none.
        """
        if self._rows is not None and max(ids, default=0) >= self._rows:
            new = set(self.new_tokens.values())
            if beyond := [token for token in ids if not self._has_row(token) and token not in new]:
                word = self.tokenizer.convert_ids_to_tokens(beyond[0])
                raise MLLMError(
                    f"The tokenizer's token {word!r} has the id {beyond[0]}, and the language model has embeddings for "
                    f"{self._rows} ids only. Take the tokenizer's files as they came with the language model, or "
                    "resize its embeddings."
                )
        return ids
