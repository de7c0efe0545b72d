"""Tokenize texts and images that stand next to each other in one pass, control words only where they are meant.

Notable: an image, a new token or, where one has to be told from the same letters in a user's text, a control word is
written as an unguessable mark, which a copy of the tokenizer has as an added token. All other text is tokenized as the
tokenizer by itself does, across the borders of the parts.
"""

from __future__ import annotations

import bisect
import itertools
import json
import re
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import AddedToken, Tokenizer

from mllm.prompts.pieces import Part, Token, shared_length


class WholeText:
    """Tokenizes parts together.

    Args:
        tokenizer: of `transformers`.

    Attributes:
        controls: the control words with their ids: special tokens, and added tokens that the tokenizer's model does not
            have, such as ``<think>``. Blank ones, such as a run of spaces, are ordinary text, and so is an unknown
            token, which stands for any text.
        special: the ids of those that are special.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._backend: Any = getattr(tokenizer, "backend_tokenizer", None)  # absent where it is written in Python
        added = dict(tokenizer.added_tokens_decoder)
        self.special = {token for token, word in added.items() if word.special} | set(tokenizer.all_special_ids)
        self.special.discard(tokenizer.unk_token_id)
        known = self._backend.model.token_to_id if isinstance(self._backend, Tokenizer) else lambda word: None
        self.controls = {
            word.content: token
            for token, word in added.items()
            if word.content.strip()
            and token != tokenizer.unk_token_id
            and (token in self.special or known(word.content) is None)
        }
        self._ids = set(self.controls.values())
        self._nonce = secrets.randbits(64)
        self._copies: dict[tuple[bool, tuple[str, ...]], tuple[Tokenizer, dict[int, int | None]]] = {}

    def find_control(self, text: str, start: int, end: int) -> re.Match[str] | None:
        """Return the first control word between two positions of a text."""
        return _pattern(self.controls).search(text, start, end)

    def holds_control(self, ids: Sequence[int]) -> bool:
        """Whether a control token is among ids."""
        return not self._ids.isdisjoint(ids)

    def tokens(self, parts: Sequence[Part], new: Mapping[str, int]) -> list[Token]:
        """Return the tokens of parts that stand next to each other.

        Args:
            parts: the parts.
            new: name -> id of tokens that the tokenizer does not have; they are recognised where all control tokens
                are.
        """
        if not isinstance(self._backend, Tokenizer):
            return self._without_offsets(parts, new)
        tokens = self._with_offsets(parts, new, guarded=False)
        if any(token.id in self._ids and not self._allowed(token, parts) for token in tokens):
            tokens = self._with_offsets(parts, new, guarded=True)
        return tokens

    def _allowed(self, token: Token, parts: Sequence[Part]) -> bool:
        """Whether a control token is recognised in all parts that its characters are of."""
        allowed = ("all",) if token.id in self.special else ("all", "words")
        return all(part.recognised in allowed for part in parts[token.first : token.last + 1])

    def _recognised(self, part: Part, new: Mapping[str, int], *, guarded: bool) -> dict[str, int]:
        """Return the words that a part has marks for."""
        if part.recognised == "none":
            return {}
        every = part.recognised == "all"
        words = {word: token for word, token in self.controls.items() if every or token not in self.special}
        return {**(words if guarded else {}), **(new if every else {})}

    def _with_offsets(self, parts: Sequence[Part], new: Mapping[str, int], *, guarded: bool) -> list[Token]:
        """Return the tokens by a copy of the tokenizer; ``guarded``: one that knows control words by marks alone."""
        backend, marked_ids = self._copy(tuple(new), new, guarded=guarded)

        def written(part: Part) -> str:
            if part.text is None:
                return self._mark("")
            words = self._recognised(part, new, guarded=guarded)
            return _pattern(words).sub(lambda match: self._mark(match[0]), part.text) if words else part.text

        texts = [written(part) for part in parts]
        starts = list(itertools.accumulate(map(len, texts), initial=0))[:-1]
        encoding = backend.encode("".join(texts), add_special_tokens=False)

        def part_at(position: int) -> int:
            return bisect.bisect_right(starts, position) - 1

        return [
            Token(marked_ids.get(token, token), part_at(start), part_at(max(start, end - 1)))
            for token, (start, end) in zip(encoding.ids, encoding.offsets, strict=True)
        ]

    def _copy(
        self, names: tuple[str, ...], new: Mapping[str, int], *, guarded: bool
    ) -> tuple[Tokenizer, dict[int, int | None]]:
        """Return a copy of the tokenizer that has marks as added tokens, and the ids that they stand for."""
        if (guarded, names) not in self._copies:
            source = json.loads(self._backend.to_str())
            source |= {"post_processor": None, "truncation": None, "padding": None}  # the first trims the offsets
            if guarded:
                _rename(source, {word: self._mark(word) for word in self.controls})
            backend = Tokenizer.from_str(json.dumps(source))
            marks = [self._mark(name) for name in ("", *names)]
            backend.add_special_tokens([AddedToken(mark, normalized=False, special=True) for mark in marks])
            stands_for: dict[str, int | None] = {"": None, **new, **(self.controls if guarded else {})}
            ids = {backend.encode(self._mark(word)).ids[0]: token for word, token in stands_for.items()}
            self._copies[guarded, names] = backend, ids
        return self._copies[guarded, names]

    def _mark(self, word: str) -> str:
        """Return the mark of a control word or a new token, or of an image, the empty word."""
        return f"\ue000{self._nonce}{word.encode().hex()}\ue001"

    def _without_offsets(self, parts: Sequence[Part], new: Mapping[str, int]) -> list[Token]:
        """Return the tokens by a tokenizer in Python: the text between images and control words is a whole."""
        tokens: list[Token] = []
        section: list[tuple[str, int]] = []

        def close(token: int | None = None, index: int | None = None) -> None:
            tokens.extend(self._of_section(section))
            section.clear()
            if index is not None:
                tokens.append(Token(token, index, index))

        for index, part in enumerate(parts):
            if part.text is None:
                close(None, index)
                continue
            words = self._recognised(part, new, guarded=True)
            for text in re.split(f"({_pattern(words).pattern})", part.text) if words else [part.text]:
                if text in words:
                    close(words[text], index)
                elif text:
                    section.append((text, index))
        close()
        return tokens

    def _of_section(self, section: Sequence[tuple[str, int]]) -> list[Token]:
        """Return the tokens of texts and the numbers of their parts: a part has those that the text before it has not.

        A token of two parts counts for the second one.
        """

        def ids(text: str) -> list[int]:
            return list(self._tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids)

        whole = ids("".join(text for text, _ in section)) if section else []
        ends = [
            shared_length(whole, ids("".join(text for text, _ in section[:count]))) for count in range(1, len(section))
        ]
        ends = [*itertools.accumulate(ends, max), len(whole)]
        numbers = [section[bisect.bisect_right(ends, index)][1] for index in range(len(whole))]
        return [Token(token, number, number) for token, number in zip(whole, numbers, strict=True)]


def _pattern(words: Mapping[str, int]) -> re.Pattern[str]:
    """Return a pattern of the leftmost, longest word; without words, one that never matches."""
    return re.compile("|".join(re.escape(word) for word in sorted(words, key=len, reverse=True)) or r"(?!)")


def _rename(source: dict[str, Any], names: Mapping[str, str]) -> None:
    """Give tokens other names in a tokenizer's JSON: as added tokens, and in its model's vocabulary."""
    for token in source["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    model = source["model"]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {names.get(word, word): token for word, token in model["vocab"].items()}
    else:
        model["vocab"] = [[names.get(word, word), score] for word, score in model["vocab"]]
    if "merges" in model:
        pairs = (merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model["merges"])
        model["merges"] = [pair for pair in pairs if not {*pair, "".join(pair)} & names.keys()]
