"""What a recipe may say: its keys, their types and their defaults, checked by pydantic."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from mllm.errors import MLLMError, near

Model = TypeVar("Model", bound=BaseModel)


PARTS = ("encoder", "lm", "connector", "adapters", "heads", "tokens", "decoder")
FROZEN = ("encoder", "lm", "decoder")  # unless a stage's 'train' names them, or something inside them


class Spec(BaseModel):
    """A mapping of the recipe whose keys are all known."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class PartSpec(BaseModel):
    """A part by its registry name; every other key is an argument of the part."""

    model_config = ConfigDict(extra="allow")
    type: str

    def options(self) -> dict[str, Any]:
        """Return the arguments of the part."""
        return dict(self.__pydantic_extra__ or {})


def _listed(value: Any) -> Any:
    """One source is short for a list of one, and none for an empty list."""
    return [] if value is None else [value] if isinstance(value, Mapping) else value


class EncoderSpec(PartSpec):
    """The frozen encoder: which model, and what is taken from it. Every other key is an argument of its type."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)
    type: str = "transformers"
    fuse: Literal["width", "sequence"] | None = None  # how those in 'of' are joined
    of: Annotated[list[EncoderSpec] | None, BeforeValidator(lambda value: _listed(value) or None)] = None
    model: str | None = Field(default=None, min_length=1, validate_default=True)
    layer: int | None = None  # index into the hidden states; null: the model's own output
    select: Literal["patches", "pooled", "all"] = "patches"
    resolution: int | None = Field(default=None, ge=1)  # pixels; null: the image processor's
    init: Literal["pretrained", "random"] = "pretrained"

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
        """Return what it is called in tables: its model, or those of the encoders inside it."""
        return self.model or " + ".join(member.label for member in self.of or ()) or self.type

    def options(self) -> dict[str, Any]:
        """Return the arguments of the encoder that are not left at their defaults; those in ``of`` are built first."""
        return self.model_dump(exclude={"type", "of"}, exclude_defaults=True)


class LMSpec(Spec):
    """The frozen language model."""

    type: str = "transformers"
    model: str = Field(min_length=1)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    quantize: Literal["8bit", "4bit"] | None = None
    init: Literal["pretrained", "random"] = "pretrained"


class PromptSpec(Spec):
    """The words around images and questions."""

    template: str = "{images}{prompt}"  # the order of the images and the words below; null: this one
    caption: str = "A picture of"
    question: str = "Question: {question} Answer:"
    chat: Literal["plain", "own"] = "plain"  # a turn in these words, or in the language model's own chat template

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
        if self.question.count("{question}") != 1:
            raise ValueError("the question prompt holds {question} once")
        return self

    @field_validator("question")
    @classmethod
    def _has_a_place(cls, value: str) -> str:
        """Braces elsewhere would fail, or do something, only when the first question is put."""
        if value.count("{question}") != 1 or set(value.replace("{question}", "")) & set("{}"):
            raise ValueError("expected {question} once, and no other braces")
        return value


class OptimSpec(Spec):
    """The optimizer and its schedule."""

    name: Literal["adamw"] = "adamw"
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    clip: float | None = 1.0
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: int = 100  # steps
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    accumulate: int = Field(default=1, ge=1)
    checkpointing: bool = False  # compute the language model's activations again, instead of keeping them
    compile: bool = False  # torch.compile


class DataSpec(BaseModel):
    """One source of items: a reader by name, and how its items come; every other key is an argument of the reader."""

    model_config = ConfigDict(extra="allow")
    format: str
    weight: float = Field(default=1.0, gt=0)  # how often it is drawn from, beside other sources
    fraction: float = Field(default=1.0, gt=0, le=1)  # of the items, by the seed; the smaller is part of the larger
    concatenate: float = Field(default=0.0, ge=0, le=1)  # how often another pair is put before one (FROMAGe, GILL)
    blank: bool = False  # pictures are black: what is learnt without seeing
    shots: int = Field(default=0, ge=0)  # solved examples before each item; of them nothing is learnt

    @model_validator(mode="after")
    def _one_way(self) -> DataSpec:
        if self.shots and self.concatenate:
            raise ValueError("a source has either 'shots' or 'concatenate': give one of the two")
        return self

    def options(self) -> dict[str, Any]:
        """Return the arguments of the reader."""
        return dict(self.__pydantic_extra__ or {})


Sources = Annotated[list[DataSpec], BeforeValidator(_listed)]


class Data(Spec):
    """What is trained on, and what the validation loss is computed on."""

    train: Sources = []
    val: Sources = []
    skip: float = Field(default=0.01, ge=0, le=1)  # of the training items, the share that may turn out unreadable
    max_length: int | None = Field(default=None, ge=8)  # positions of an example, images included
    truncate: Literal["drop", "text"] = "drop"  # what is longer is left out, or loses text at its end
    group_by_length: int | None = Field(default=None, ge=2)  # batches that are drawn together and cut by length
    pack: int | None = Field(default=None, ge=8)  # positions of a row that holds several examples


class InitSpec(Spec):
    """Trained parts taken from another run."""

    model_config = ConfigDict(populate_by_name=True)
    source: str | None = Field(default=None, alias="from")  # a run, or a saved model
    parts: list[str] = []  # paths in it (connector, connector.qformer, heads.retrieval); none: all that it trained


class FitSpec(Spec):
    """A closed-form fit of one part: no gradient. What is left out is as its kind, in ``fits/``, has it."""

    part: str = "connector"  # or a head's path, heads.NAME
    solver: Literal["ridge", "least-squares", "procrustes", "correlation"] | None = None
    targets: Literal["caption-words", "tokens", "sentences"] | None = None  # tokens: their own strings, no data
    strength: float | None = Field(default=None, gt=0)  # of the ridge, as a share of the features' mean variance

    def options(self) -> dict[str, Any]:
        """Return what is given, other than the part."""
        return self.model_dump(exclude={"part"}, exclude_none=True)


class ObjectiveSpec(PartSpec):
    """A loss by its registry name, and its weight in the stage's sum."""

    weight: float = 1.0


class EvalSpec(Spec):
    """Suites a recipe is held against (`mllm recipes verify`), and what is looked at while training."""

    suites: list[str] = []
    limit: int | None = Field(default=None, ge=1)  # items of a suite; null: all
    every: int | None = Field(default=None, ge=1)  # steps; then the suites are run, and the prompts below answered
    show: int = Field(default=4, ge=0)  # validation items whose answers are logged each time


class Settings(Spec):
    """What the recipe sets for all stages, and a stage may override."""

    encoder: EncoderSpec | None = None
    lm: LMSpec | None = None
    connector: PartSpec | None = None
    adapters: list[PartSpec] = []
    heads: list[PartSpec] = []
    tokens: list[str] = []
    decoder: PartSpec | None = None
    scorer: PartSpec | None = None
    prompt: PromptSpec = PromptSpec()
    decoding: dict[str, Any] = {"max_new_tokens": 20}
    data: Data = Data()
    init: InitSpec = InitSpec()
    optim: OptimSpec = OptimSpec()
    cache: Literal["auto", "on", "off"] = "auto"
    eval: EvalSpec = EvalSpec()
    track: list[Literal["tensorboard", "trackio", "wandb"]] = []  # losses go there too
    seed: int = 0


class AssemblySpec(Spec):
    """What a model is built from: the part of a recipe that is saved with the trained tensors."""

    encoder: EncoderSpec | None = None
    lm: LMSpec | None = None
    connector: PartSpec | None = None
    adapters: list[PartSpec] = []
    heads: list[PartSpec] = []
    tokens: list[str] = []
    decoder: PartSpec | None = None
    scorer: PartSpec | None = None
    prompt: PromptSpec = PromptSpec()
    decoding: dict[str, Any] = {"max_new_tokens": 20}
    trained: list[str] = []  # paths of what has been trained inside parts that are frozen otherwise
    seed: int = 0


class Stage(Settings):
    """One stage: the recipe's settings with the stage's own over them, and what is fitted or trained."""

    name: str
    fit: FitSpec | None = None
    train: dict[str, float] = {}  # part, or dotted path inside one -> learning rate
    objectives: list[ObjectiveSpec] = [ObjectiveSpec(type="caption")]
    steps: int | None = Field(default=None, ge=1)
    batch_size: int = Field(default=32, ge=1)
    validate_every: int | None = Field(default=None, ge=1)  # steps
    keep: Literal["last", "best"] = "last"  # best: what had the lowest validation loss is what the stage ends with
    patience: int | None = Field(default=None, ge=1)  # stop after so many validations without a lower loss
    checkpoint_every: int = Field(default=100, ge=1)  # steps; what a killed run goes on from

    @model_validator(mode="before")
    @classmethod
    def _train_list(cls, values: Any) -> Any:
        """``train: [connector]`` is short for the default learning rate."""
        if isinstance(values, dict) and isinstance(values.get("train"), list):
            values = {**values, "train": {part: 2.0e-4 for part in values["train"]}}
        return values

    @model_validator(mode="after")
    def _one_kind(self) -> Stage:
        if bool(self.fit) == bool(self.train):
            raise ValueError("a stage has either 'fit' or 'train': give one of the two")
        if self.train and self.steps is None:
            raise ValueError("a stage that trains needs 'steps'")
        if (self.keep == "best" or self.patience) and not (self.validate_every and self.data.val):
            raise ValueError("keep: best and patience go by the validation loss: give validate_every and data.val")
        return self


class Recipe(Settings):
    """A whole recipe, checked; ``stages`` are resolved (each carries every setting)."""

    name: str
    about: str = ""  # one line, shown by `mllm recipes`
    paper: str = ""  # arXiv:NUMBER
    stages: list[Stage] = []

    def assembly(self, stage: Stage) -> AssemblySpec:
        """Return what a stage's model is built from; what earlier stages and this one train is in it."""
        shared = {key: getattr(stage, key) for key in AssemblySpec.model_fields if key not in ("seed", "trained")}
        done = list(itertools.takewhile(lambda each: each is not stage, self.stages))
        paths = dict.fromkeys(path for each in (*done, stage) for path in each.train if path.split(".")[0] in FROZEN)
        return AssemblySpec(**shared, trained=list(paths), seed=self.seed)


def checked(model: type[Model], values: Any, label: str = "These settings do not fit") -> Model:
    """Return ``values`` as a checked ``model``.

    Raises:
        MLLMError: every problem on a line of its own, with the key, the value and the near match.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise MLLMError(f"{label}:\n" + "\n".join(_explain(model, error))) from None


def _explain(model: type[BaseModel], error: ValidationError) -> list[str]:
    """One line for each problem: the key, the value, what was expected, the near match."""
    problems = error.errors()
    shared = {(problem["loc"], problem["type"]) for problem in problems}
    lines = []
    for problem in problems:
        location = problem["loc"]
        if location[:1] == ("stages",) and (location[2:], problem["type"]) in shared:
            continue  # a stage repeats what the recipe sets for all
        lines.append(f"  {'.'.join(str(step) for step in location) or 'recipe'}: {_reason(model, problem)}")
    return lines


def _reason(model: type[BaseModel], problem: Any) -> str:
    """Say what is wrong with one key: a mapping's value is not repeated, it may be long."""
    if problem["type"] == "extra_forbidden":
        return f"unknown key. {near(str(problem['loc'][-1]), _siblings(model, problem['loc']))}"
    if problem["type"] == "missing":
        return "missing"
    message = str(problem["msg"]).removeprefix("Value error, ")
    return message if isinstance(problem["input"], Mapping) else f"{problem['input']!r}: {message}"


def _siblings(model: Any, location: tuple[int | str, ...]) -> list[str]:
    """Return the keys that are known beside an unknown one."""
    for step in location[:-1]:
        if isinstance(step, int) or not hasattr(model, "model_fields"):
            continue
        field = next((f for name, f in model.model_fields.items() if step in (name, f.alias)), None)
        model = _model_of(field.annotation) if field else model
    return [field.alias or name for name, field in model.model_fields.items()]


def _model_of(annotation: Any) -> Any:
    """Return the pydantic model inside ``X``, ``X | None`` or ``list[X]``."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for argument in getattr(annotation, "__args__", ()):
        found = _model_of(argument)
        if found is not None:
            return found
    return None
