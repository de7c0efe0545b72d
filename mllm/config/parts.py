"""Define the keys of a model's parts, and of how these are fitted: their types and defaults."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

from mllm.config.base import PartSpec as PartSpec
from mllm.config.base import Spec as Spec
from mllm.config.base import listed as listed
from mllm.config.encoders import EncoderSpec as EncoderSpec
from mllm.config.encoders import add_resize as add_resize
from mllm.config.encoders import encoders_in as encoders_in

PARTS = ("encoder", "lm", "connector", "adapters", "heads", "tokens", "decoder")
FROZEN = ("encoder", "lm", "decoder")  # unless a stage's 'train' names them, or something inside them


def part_of(path: str) -> str:
    """Return the part that a dotted path names, or names something inside of: ``lm`` for ``lm.model.layers.1``."""
    return path.partition(".")[0]


class VocabularySpec(Spec):
    """The words that a connector's output is expressed in; see `mllm.lms.words.Vocabulary`."""

    words: Literal["language", "data", "all"] | list[str] = "language"
    temperature: float = Field(default=0.05, gt=0)  # initial: it is learned
    output: Literal["words", "tokens"] = "words"  # expected word embeddings, or the visual tokens as they are


class ConnectorSpec(PartSpec):
    """A connector by its registry name, and whether its output is expressed in words; the rest are its arguments."""

    vocabulary: VocabularySpec | None = None  # true: with its defaults

    @field_validator("vocabulary", mode="before")
    @classmethod
    def _switched(cls, value: Any) -> Any:
        return {} if value is True else None if value is False else value

    @model_serializer(mode="wrap")
    def _without_none(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out a vocabulary that is not there: a run that was written before is resumed unchanged."""
        values: dict[str, Any] = write(self)
        return {key: value for key, value in values.items() if key != "vocabulary" or value is not None}


class HeadSpec(PartSpec):
    """A head by its registry name; a model has several of one type under different names."""

    name: str = ""  # its type if left out; its path is heads.NAME

    @model_validator(mode="after")
    def _named(self) -> HeadSpec:
        self.name = self.name or self.type
        return self

    @model_serializer(mode="wrap")
    def _without_a_default_name(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out a name that is the type: a run that was written before heads had names is resumed unchanged."""
        values: dict[str, Any] = write(self)
        return {key: value for key, value in values.items() if key != "name" or value != self.type}


def _distinct(heads: list[HeadSpec]) -> list[HeadSpec]:
    names = [head.name for head in heads]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"two heads are called {twice[0]!r}: give one of them another name, name: ...")
    return heads


Heads = Annotated[list[HeadSpec], BeforeValidator(listed), AfterValidator(_distinct)]
Adapters = Annotated[list[PartSpec], BeforeValidator(listed)]
Names = Annotated[list[str], BeforeValidator(listed)]


def switch(value: Any) -> Any:
    """Return ``on`` or ``off`` for a boolean, as which YAML reads these words where they are not quoted."""
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else value


class LMSpec(Spec):
    """The frozen language model."""

    type: str = "transformers"
    model: str = Field(min_length=1)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    quantize: Literal["8bit", "4bit"] | None = None
    init: Literal["pretrained", "random"] = "pretrained"


# Words of the prompt format: where a recipe gives them, conversations are in these words, too.
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


class PromptSpec(Spec):
    """The words around images and questions."""

    template: str = "{images}{prompt}"  # the order of the images and the words below; null: this one
    caption: str = "A picture of"
    question: str = "Question: {question} Answer:"
    examples: list[ExampleSpec] = []  # solved ones before every prompt
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
        if not re.fullmatch(r"[^{}]*\{images\}[^{}]*\{prompt\}", self.template):
            raise ValueError("the template holds {images} once, and ends with {prompt}")
        if self.chat == "auto" and self.model_fields_set & set(OWN_WORDS):
            self.chat = "plain"
        return self

    @model_serializer(mode="wrap")
    def _as_given(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out words that were not given, by which 'auto' decides, and examples and options if there are none.

        So a run that was written before these keys is resumed unchanged.
        """
        values: dict[str, Any] = write(self)
        unset = {key for key in ("examples", "chat_options") if not values.get(key)}
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


class InitSpec(Spec):
    """Trained parts taken from another run."""

    model_config = ConfigDict(populate_by_name=True)
    source: str | None = Field(default=None, alias="from")  # a run, or a saved model
    parts: list[str] = []  # paths in it (connector, connector.qformer, heads.retrieval); none: all trained parts


class FitSpec(Spec):
    """A closed-form fit of one part, without a gradient. Defaults are those of the part's fit, in ``fits/``."""

    part: str = "connector"  # or a head's path, heads.NAME
    solver: Literal["ridge", "least-squares", "procrustes", "correlation"] | None = None
    targets: Literal["caption-words", "words-in-order", "tokens", "sentences"] | None = None  # tokens: no data
    strength: float | None = Field(default=None, gt=0)  # of the ridge, as a share of the features' mean variance

    def options(self) -> dict[str, Any]:
        """Return the arguments of the fit that are given."""
        return self.model_dump(exclude={"part"}, exclude_none=True)


class ObjectiveSpec(PartSpec):
    """A loss by its registry name, and its weight in the stage's sum."""

    weight: float = 1.0


class Parts(Spec):
    """The parts of a model and how it is prompted: what a recipe, a stage and a saved model all specify."""

    encoder: EncoderSpec | None = None
    lm: LMSpec | None = None
    connector: ConnectorSpec | None = None
    adapters: Adapters = []
    heads: Heads = []
    tokens: Names = []
    decoder: PartSpec | None = None
    scorer: PartSpec | None = None
    prompt: PromptSpec = PromptSpec()
    decoding: dict[str, Any] = {"max_new_tokens": 20}
    seed: int = 0


class AssemblySpec(Parts):
    """What a model is built from: the part of a recipe that is saved with the trained tensors."""

    trained: list[str] = []  # paths of the modules that have been trained inside parts that are frozen otherwise
    seeds: dict[str, int] = {}  # of frozen parts whose random weights an earlier stage drew with another seed

    def trains(self, part: str) -> bool:
        """Whether a part that is frozen otherwise has been trained, or something inside it."""
        return part in map(part_of, self.trained)

    def seed_of(self, part: str) -> int:
        """Return the seed that a part's random weights are drawn with."""
        return self.seeds.get(part, self.seed)

    def following(self, before: AssemblySpec) -> AssemblySpec:
        """Return this specification as that of the stage after another: what is trained and drawn there is kept."""
        weights = {part: (_weights(getattr(self, part)), _weights(getattr(before, part))) for part in FROZEN}
        kept = {part: before.seed_of(part) for part, (new, old) in weights.items() if new is not None and new == old}
        seeds = {part: seed for part, seed in kept.items() if seed != self.seed}
        trained = list(dict.fromkeys([*before.trained, *self.trained]))
        return self.model_copy(update={"trained": trained, "seeds": seeds})


def _weights(spec: Any) -> Any:
    """Return what decides which weights a frozen part has: neither its precision, nor which of its layers is read."""
    if spec is None:
        return None
    members = [_weights(member) for member in getattr(spec, "of", None) or ()]
    return spec.type, getattr(spec, "model", None), getattr(spec, "init", None), members
