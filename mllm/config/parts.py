"""Define the keys of a model's parts, and of how these are fitted: their types and defaults."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationInfo,
    field_validator,
    model_serializer,
    model_validator,
)

from mllm.config.base import Finite, PartSpec, Spec, each_once
from mllm.config.lm import DType, LMSpec
from mllm.config.prompt import PromptSpec
from mllm.config.tiles import TilesSpec

PARTS = ("encoder", "lm", "connector", "adapters", "heads", "tokens", "decoder")
FROZEN = ("encoder", "lm", "decoder")  # unless a stage's 'train' names them, or something inside them
RESIZING = ("transformers", "timm", "open-clip")  # types of encoders that have 'resize'


SCORER = "scorer"  # the guide that is saved with the model, since answers are chosen by it
KINDS = ("caption", "question")  # of answers, for which 'decoding' may have options of their own


def part_of(path: str) -> str:
    """Return the part that a dotted path names, or names something inside of: ``lm`` for ``lm.model.layers.1``."""
    return path.partition(".")[0]


class VocabularySpec(Spec):
    """The words that a connector's output is expressed in; see `mllm.lms.words.Vocabulary`."""

    words: Literal["language", "data", "all"] | list[str] = "language"
    temperature: float = Field(default=0.05, gt=0)  # initial: it is learned
    output: Literal["words", "tokens"] = "words"  # expected word embeddings, or the visual tokens as they are


class ConnectorSpec(PartSpec):
    """A connector by its registry name, its width, and whether its output is expressed in words.

    The other keys are its arguments.
    """

    vocabulary: VocabularySpec | None = None  # true: with its defaults
    # Of visual tokens where there is no language model: a number, or the name of a guide, whose vectors have it.
    width: Annotated[int, Field(ge=1)] | str | None = None

    @field_validator("vocabulary", mode="before")
    @classmethod
    def _switched(cls, value: Any) -> Any:
        return {} if value is True else None if value is False else value

    @model_serializer(mode="wrap")
    def _without_none(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out a vocabulary and a width that are not named: a run that was written before is resumed unchanged."""
        values: dict[str, Any] = write(self)
        later = ("vocabulary", "width")
        return {key: value for key, value in values.items() if key not in later or key in self.model_fields_set}


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


def listed(value: Any) -> Any:
    """Return a list: one mapping is short for a list of one, None for an empty list."""
    return [] if value is None else [value] if isinstance(value, Mapping) else value


Heads = Annotated[list[HeadSpec], BeforeValidator(listed), AfterValidator(_distinct)]
Adapters = Annotated[list[PartSpec], BeforeValidator(listed)]
Names = Annotated[list[Annotated[str, Field(min_length=1)]], BeforeValidator(listed), AfterValidator(each_once)]
LONGEST_NAME = 200  # bytes; file systems have 255, and some names are extended
Seed = Annotated[int, Field(ge=0, lt=2**32)]  # what every random generator takes


def _single(name: str) -> str:
    """Refuse a name that would not be one file or folder inside another."""
    if name in (".", "..") or re.search(r"[/\\\x00-\x1f\x7f]", name) or not 0 < len(name.encode()) <= LONGEST_NAME:
        raise ValueError(f"files are called by it: no slash, no control character, at most {LONGEST_NAME} bytes")
    return name


Name = Annotated[str, AfterValidator(_single)]


def switch(value: Any) -> Any:
    """Return ``on`` or ``off`` for a boolean, as which YAML reads these words where they are not quoted."""
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else value


class EncoderSpec(PartSpec):
    """The frozen encoder: which model, and which of its outputs. Every other key is an argument of its type."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)
    type: str = "transformers"
    fuse: Literal["width", "sequence"] | None = None  # how the encoders in 'of' are joined
    of: Annotated[list[EncoderSpec] | None, BeforeValidator(lambda value: listed(value) or None)] = None
    model: str | None = Field(default=None, min_length=1, validate_default=True)
    layer: int | None = None  # index into the hidden states; null: the model's last output
    select: Literal["patches", "pooled", "all"] = "patches"
    resolution: int | None = Field(default=None, ge=1)  # pixels; null: the image processor's
    resize: Literal["stretch", "crop", "pad"] | None = None  # how an image becomes a square; null: the model's own way
    init: Literal["pretrained", "random"] = "pretrained"
    trust_remote_code: bool = False  # run Python code from the model's repository
    tiles: TilesSpec | None = Field(default=None, discriminator="kind")  # null: every image is encoded as a whole
    dtype: DType = "auto"  # of the weights; auto: bfloat16 on a GPU that computes in it, unless it trains

    @model_validator(mode="after")
    def _tiles_fit(self) -> EncoderSpec:
        if any(member.tiles is not None for member in self.of or ()):
            raise ValueError("tiles: encoders in 'of' cannot cut images. Leave tiles out")
        if self.tiles is not None and self.type not in RESIZING:
            raise ValueError(f"tiles: expected an encoder of type {', '.join(RESIZING)}")
        if self.tiles is not None and self.resize not in (None, "stretch"):
            raise ValueError(f"tiles: they decide how an image becomes squares, and resize is {self.resize}")
        return self

    @model_serializer(mode="wrap")
    def _without_none(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out tiles and a dtype that are not named: a run that was written before is resumed unchanged."""
        values: dict[str, Any] = write(self)
        later = ("tiles", "dtype")
        return {key: value for key, value in values.items() if key not in later or key in self.model_fields_set}

    @model_validator(mode="before")
    @classmethod
    def _fused(cls, values: Any) -> Any:
        return {"type": "fuse", **values} if isinstance(values, dict) and values.get("fuse") else values

    @field_validator("model")
    @classmethod
    def _some_model(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is None and not info.data.get("of") and info.data.get("type") == "transformers":
            raise ValueError("give an installed part, a folder or a hub id")
        return value

    @property
    def label(self) -> str:
        """Return its name in tables: its model, or those of the encoders inside it."""
        return self.model or " + ".join(member.label for member in self.of or ()) or self.type

    def options(self) -> dict[str, Any]:
        """Return the arguments of the encoder that differ from their defaults, without those in ``of``."""
        return self.model_dump(exclude={"type", "of", "tiles", "dtype"}, exclude_defaults=True)


def encoders_in(parts: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the mappings of the encoder of a recipe, of its stages, or of a saved model, and of those inside it."""
    for stage in parts.get("stages") or ():
        yield from encoders_in(stage)
    waiting = [parts.get("encoder")]
    while waiting:
        if isinstance(encoder := waiting.pop(), dict):
            yield encoder
            waiting += encoder.get("of") or []


def add_resize(parts: Mapping[str, Any]) -> None:
    """Set ``resize`` of encoders that were saved before there was this key: their images were stretched."""
    for encoder in encoders_in(parts):
        if "resize" not in encoder and encoder.get("type", "transformers") in RESIZING:
            encoder["resize"] = "stretch"


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
    decoding: Finite = {"max_new_tokens": 20}  # of all answers; in it, caption: {...} and question: {...}
    seed: Seed = 0

    def remote_code(self) -> dict[str, str]:
        """Return the parts that may run code of their repositories: path -> model."""
        named: list[tuple[str, Any]] = [("encoder", self.encoder), ("lm", self.lm)]
        allowed = {}
        while named:
            path, spec = named.pop(0)
            members = getattr(spec, "of", None) or ()
            named += [(f"{path}.of.{number}", member) for number, member in enumerate(members)]
            if spec is not None and spec.trust_remote_code:
                allowed[path] = str(spec.model)
        return allowed

    @model_validator(mode="after")
    def _entities_have_a_scorer(self) -> Parts:
        if self.prompt.entities is not None and self.scorer is None:
            raise ValueError("prompt.entities are found by a scorer when the model answers: give scorer: {type: ...}")
        return self

    @field_validator("decoding")
    @classmethod
    def _by_kind(cls, value: dict[str, Any]) -> dict[str, Any]:
        for kind in KINDS:
            if not isinstance(value.get(kind, {}), dict):
                raise ValueError(f"{kind}: {value[kind]!r}: expected options, such as max_new_tokens: 30")
        return value

    @property
    def longest_answer(self) -> int:
        """Return the largest ``max_new_tokens`` of any kind of answer; 1 where it is what fits into the context."""
        options = [self.decoding, *({**self.decoding, **self.decoding.get(kind, {})} for kind in KINDS)]
        lengths = [each.get("max_new_tokens", 20) for each in options]
        return max(length if isinstance(length, int) else 1 for length in lengths)


class AssemblySpec(Parts):
    """What a model is built from: the part of a recipe that is saved with the trained tensors."""

    trained: list[str] = []  # paths of the modules that have been trained inside parts that are frozen otherwise
    seeds: dict[str, Seed] = {}  # of frozen parts whose random weights an earlier stage drew with another seed

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
