"""Define the keys of a recipe's prompt format: the words around images and questions, and conversations."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, field_validator, model_serializer, model_validator

from mllm.config.base import Spec

OWN_WORDS = ("question", "template")
# Arguments of transformers' apply_chat_template that are given where a conversation is written.
RESERVED = {
    "conversation",
    "add_generation_prompt",
    "continue_final_message",
    "tokenize",
    "padding",
    "truncation",
    "max_length",
    "return_tensors",
    "return_dict",
    "return_assistant_tokens_mask",
    "tokenizer_kwargs",
}


class ExampleSpec(Spec):
    """A solved example: an image, or words in its place, and the answer that follows the prompt."""

    image: str | None = None  # a file
    words: str = ""
    question: str | None = None  # null: the answer is a caption
    answer: str

    @model_validator(mode="after")
    def _one_of_two(self) -> ExampleSpec:
        if bool(self.image) == bool(self.words):
            raise ValueError("an example has an image, or words in its place: give one of the two")
        return self


class EntitiesSpec(Spec):
    """Words of a vocabulary, behind a prompt's last image: those of its caption in training, then what a scorer finds.

    A scorer's words are the most similar ones whose share of the softmax over the whole vocabulary is high enough.
    """

    of: list[Annotated[str, Field(min_length=1)]] | str = Field(min_length=1)  # words, or a file with one on each line
    text: str = " There are {entities} in image."
    none: str = "something"  # where there are no words
    drop: float = Field(default=0.0, ge=0, lt=1)  # how often each word of a caption is left out in training
    most: int = Field(default=10, ge=1)  # words of a caption
    top: int = Field(default=3, ge=1)  # words of a scorer
    threshold: float = Field(default=0.2, ge=0, le=1)
    temperature: float = Field(default=0.01, gt=0)

    @field_validator("text")
    @classmethod
    def _has_one_field(cls, value: str) -> str:
        if value.count("{entities}") != 1 or set(value.replace("{entities}", "")) & set("{}"):
            raise ValueError("expected {entities} once, and no other braces")
        return value


class PromptSpec(Spec):
    """The words around images and questions."""

    template: str = "{images}{prompt}"  # the order of the images and the words below; null: this one
    caption: str = "A picture of"
    question: str = "Question: {question} Answer:"
    # A user's turn, such as "USER: {images}\n{question} ASSISTANT:", instead of template and question; in a turn
    # without images what is between the two is left out.
    turn: str = ""
    system: str = ""  # before every prompt, as it is, and before conversations without a system message
    examples: list[ExampleSpec] = []  # solved ones before every prompt
    entities: EntitiesSpec | None = None
    # Conversations: in these words; in the language model's own chat template; or auto, in the template if there is one
    # and neither 'question' nor 'template' is given.
    chat: Literal["auto", "own", "plain"] = "auto"
    chat_options: dict[str, Any] = {}  # of the chat template, such as enable_thinking: false

    @model_validator(mode="before")
    @classmethod
    def _default_template(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("template", "") is None:
            return {key: value for key, value in values.items() if key != "template"}
        return values

    @model_validator(mode="after")
    def _fields(self) -> PromptSpec:
        self._take_turn()
        if not re.fullmatch(r"[^{}]*\{images\}[^{}]*\{prompt\}", self.template):
            raise ValueError("the template holds {images} once, and ends with {prompt}")
        if self.chat == "auto" and self.model_fields_set & set(OWN_WORDS):
            self.chat = "plain"
        return self

    def _take_turn(self) -> None:
        """Set ``template`` and ``question`` to what ``turn`` says."""
        if not self.turn:
            return
        slots = re.fullmatch(r"([^{}]*)\{images\}([^{}]*)\{question\}([^{}]*)", self.turn)
        if slots is None:
            raise ValueError("turn: expected {images} and then {question}, each once, and no other braces")
        opening, between, closing = slots.groups()
        words = {"template": f"{opening}{{images}}{between}{{prompt}}", "question": f"{{question}}{closing}"}
        for key, value in words.items():
            if key in self.model_fields_set and getattr(self, key) != value:
                raise ValueError(f"turn and {key} are two ways to say one thing: leave out one of them")
            setattr(self, key, value)

    @property
    def opening(self) -> str:
        """Return the words before the user's question in a turn without images."""
        return self.turn.partition("{images}")[0]

    @model_serializer(mode="wrap")
    def _as_given(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out words that were not given, by which 'auto' decides, and examples and options if there are none.

        So a run that was written before these keys is resumed unchanged.
        """
        values: dict[str, Any] = write(self)
        unset = {key for key in ("examples", "chat_options", "turn", "system", "entities") if not values.get(key)}
        unset |= set(OWN_WORDS) if self.chat == "auto" else set()
        return {key: value for key, value in values.items() if key not in unset}

    @field_validator("chat_options")
    @classmethod
    def _of_the_template(cls, value: dict[str, Any]) -> dict[str, Any]:
        """Refuse arguments of ``apply_chat_template`` that are not the template's."""
        if reserved := sorted(set(value) & RESERVED):
            raise ValueError(f"{', '.join(reserved)}: expected options of the chat template, such as enable_thinking")
        return value

    @field_validator("question")
    @classmethod
    def _has_one_field(cls, value: str) -> str:
        """Refuse other braces: they would fail, or be replaced, only when the first question is asked."""
        if value.count("{question}") != 1 or set(value.replace("{question}", "")) & set("{}"):
            raise ValueError("expected {question} once, and no other braces")
        return value
