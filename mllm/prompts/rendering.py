"""Fill a chat template with a conversation: as it is, with marks inside its texts, or with an image given twice."""

from __future__ import annotations

import itertools
import re
import secrets
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from jinja2 import TemplateError

from mllm.errors import MLLMError

# How a template is given turns: those with an image as lists of parts, all as lists of parts, or all as texts.
Form = Literal["either", "parts", "text"]
Kind = Literal["start", "end", "image"]  # of a mark
KINDS: tuple[Kind, ...] = ("start", "end", "image")
REFUSAL = 2  # the weight of a template's own error
PLAIN = "or write conversations in the recipe's own words: prompt.chat=plain."


class Unfit(MLLMError):
    """A template cannot be given a conversation in a form.

    Args:
        message: for the user.
        weight: of several errors, that of the largest weight says best what is wrong.
    """

    def __init__(self, message: str, weight: int) -> None:
        super().__init__(message)
        self.weight = weight

    @property
    def refusal(self) -> bool:
        """Whether the template itself refuses the conversation, in its own words."""
        return self.weight == REFUSAL


class Numbered(NamedTuple):
    """A part of a conversation's message: the numbers of its message and its role, and the part."""

    turn: int
    role: str
    part: dict[str, Any]


class Renderer:
    """Fills a chat template with a conversation.

    Args:
        messages: checked ones (`mllm.prompts.messages.checked_messages`).
        form: how the template is given the turns.
        tokenizer: of `transformers`, with the template.
        options: of the template.
        generation: end where the answer starts.

    Attributes:
        parts: of all messages; a part's number is its index here.
    """

    def __init__(
        self,
        messages: Sequence[dict[str, Any]],
        form: Form,
        *,
        tokenizer: Any,
        options: dict[str, Any],
        generation: bool,
    ) -> None:
        self.messages, self.form, self.tokenizer = messages, form, tokenizer
        self.parts = [
            Numbered(turn, message["role"], part)
            for turn, message in enumerate(messages)
            for part in message["content"]
        ]
        self._options, self._generation = options, generation
        self._nonce = str(secrets.randbits(64))

    def render(self, *, marked: Sequence[Kind] = (), doubled: int | None = None, asked: int | None = None) -> str:
        """Return the conversation as the template writes it.

        Args:
            marked: with marks at the start of every text, at its end, or both.
            doubled: the number of a part that is given twice.
            asked: the number of a turn: render the turns before it, and end where it starts.

        Raises:
            Unfit: the template raises an error, or prints a list of parts.
        """
        numbers = itertools.count()
        turns = []
        for message in self.messages[:asked]:
            numbered = [(next(numbers), part) for part in message["content"]]
            parts = [
                self._given(number, part, marked) for number, part in numbered for _ in range(1 + (number == doubled))
            ]
            turns.append({"role": message["role"], "content": self._content(parts)})
        generation = self._generation or asked is not None
        try:
            text = self.tokenizer.apply_chat_template(
                turns, tokenize=False, add_generation_prompt=generation, **self._options
            )
        except Exception as error:  # a template is a program: it may raise anything
            reason = f"The chat template refuses this conversation: {error}. Change its turns, {PLAIN}"
            raise Unfit(reason, REFUSAL if type(error) is TemplateError else 0) from error
        if self._printed in text:
            raise Unfit(f"The chat template takes texts, and prints a list of parts as it is. Change it, {PLAIN}", 0)
        return str(text)

    def mark(self, kind: Kind, number: int) -> str:
        """Return a part's mark, which no text contains, and which upper and lower case leave as it is."""
        return f"\ue000{self._nonce}.{KINDS.index(kind)}.{number}\ue001"

    def split(self, text: str, *kinds: Kind) -> tuple[list[str], list[tuple[Kind, int]]]:
        """Return the text around the marks of some kinds, and each mark's kind and the number of its part."""
        numbers = "".join(str(KINDS.index(kind)) for kind in kinds)
        split = re.split(f"\ue000{self._nonce}[.]([{numbers}])[.]([0-9]+)\ue001", text)
        return split[::3], [(KINDS[int(k)], int(number)) for k, number in zip(split[1::3], split[2::3], strict=True)]

    def lost(self, number: int, reason: str) -> Unfit:
        """Return the error that the template loses a part."""
        turn, role, _ = self.parts[number]
        return Unfit(f"The chat template loses turn {turn + 1} ({role}): {reason}. Leave this turn out, {PLAIN}", 1)

    @property
    def _printed(self) -> str:
        """Return a value in every marked part of a list: it is in a rendering if the template prints the list."""
        return f"{self._nonce}.printed"

    def _given(self, number: int, part: dict[str, Any], marked: Sequence[Kind]) -> dict[str, Any]:
        """Return a part as the template is given it; in a text, an image is a mark."""
        extra = {"mllm": self._printed} if marked else {}
        if part["type"] == "image":
            return {"type": "image", **({"text": self.mark("image", number)} if self.form == "text" else extra)}
        return {"type": "text", "text": self._marked(number, part["text"], marked), **extra}

    def _content(self, parts: list[dict[str, Any]]) -> str | list[dict[str, Any]]:
        is_one_text = len(parts) == 1 and parts[0]["type"] == "text"
        if self.form == "text" or (self.form == "either" and is_one_text):
            return "".join(part["text"] for part in parts)
        return parts

    def _marked(self, number: int, text: str, kinds: Sequence[Kind]) -> str:
        """Return a text with marks at its first and last characters that are not blank: it is trimmed as before."""
        core = text.strip()
        start = len(text) - len(text.lstrip())
        first, last = (self.mark(kind, number) if kind in kinds and core else "" for kind in KINDS[:2])
        return f"{text[:start]}{first}{core}{last}{text[start + len(core) :]}"
