"""Turn text into ids and back, new tokens included."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from mllm.errors import MLLMError


class TextTokenizer:
    """A tokenizer of `transformers`, and the new tokens that it does not know.

    Args:
        tokenizer: of `transformers`; None where a model is planned without its files.

    Attributes:
        new_tokens: name -> id of the tokens that were added to the language model.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.new_tokens: dict[str, int] = {}

    @property
    def bos(self) -> list[int]:
        """Return the ids that every sequence starts with: the beginning-of-sequence token, if the tokenizer adds it."""
        ids = self.tokenizer("x").input_ids
        return ids[:1] if ids and ids[0] == self.tokenizer.bos_token_id else []

    @property
    def eos(self) -> int:
        """Return the id that ends an answer."""
        if self.tokenizer.eos_token_id is None:
            raise MLLMError("This language model's tokenizer has no end-of-sequence token, so no answer can end.")
        return int(self.tokenizer.eos_token_id)

    @property
    def pad(self) -> int:
        """Return the padding id; padding is always masked, so any id will do."""
        pad = self.tokenizer.pad_token_id
        return int(self.eos if pad is None else pad)

    @property
    def end_of_text(self) -> list[int]:
        """Return the ids that the tokenizer appends to a text, if it appends any."""
        ids = self.tokenizer("x").input_ids if self.tokenizer is not None else []
        return ids[-1:] if ids and ids[-1] == self.tokenizer.eos_token_id else []

    def tokenize(self, text: str, *, control: bool = False) -> list[int]:
        """Return the ids of a text without added special tokens; ``control``: special tokens in it are recognised."""
        if control and self.new_tokens:
            pattern = f"({'|'.join(map(re.escape, self.new_tokens))})"
            pieces = [piece for piece in re.split(pattern, text) if piece]
            return [i for piece in pieces for i in self._ids(piece, control=True)]
        return self._ids(text, control=control)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids, special tokens left out."""
        new = set(self.new_tokens.values())
        return str(self.tokenizer.decode([i for i in ids if i not in new], skip_special_tokens=True))

    def until_eos(self, ids: list[int]) -> list[int]:
        """Return the ids before the first end-of-sequence token."""
        return ids[: ids.index(self.eos)] if self.eos in ids else ids

    def _ids(self, text: str, *, control: bool) -> list[int]:
        if control and text in self.new_tokens:
            return [self.new_tokens[text]]
        return list(self.tokenizer(text, add_special_tokens=False, split_special_tokens=not control).input_ids)
