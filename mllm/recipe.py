"""Read a recipe: one YAML file that names the parts, the data, the objectives and the stages.

Everything configurable enters here, at the edge: OmegaConf merges (``extends``, dotted overrides, a stage's overrides),
pydantic checks. A leaf is handed flat keyword arguments, never the recipe.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from yaml import YAMLError

from mllm.errors import MLLMError, near


Model = TypeVar("Model", bound=BaseModel)


class Spec(BaseModel):
    """A mapping of the recipe whose keys are all known."""

    model_config = ConfigDict(extra="forbid")


class PartSpec(BaseModel):
    """A part by its registry name; every other key is an argument of the part."""

    model_config = ConfigDict(extra="allow")
    type: str

    def options(self) -> dict[str, Any]:
        """Return the arguments of the part."""
        return dict(self.__pydantic_extra__ or {})


class EncoderSpec(Spec):
    """The frozen encoder: which model, and what is taken from it."""

    type: str = "transformers"
    model: str
    layer: int | None = None  # index into the hidden states; null: the model's own output
    select: Literal["patches", "pooled", "all"] = "patches"
    resolution: int | None = None  # pixels; null: the image processor's
    init: Literal["pretrained", "random"] = "pretrained"


class LMSpec(Spec):
    """The frozen language model."""

    type: str = "transformers"
    model: str
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    quantize: Literal["8bit", "4bit"] | None = None
    init: Literal["pretrained", "random"] = "pretrained"


class PromptSpec(Spec):
    """The words around images and questions."""

    template: str | None = None
    caption: str = "A picture of"
    question: str = "Question: {question} Answer:"


class OptimSpec(Spec):
    """The optimizer and its schedule."""

    name: Literal["adamw"] = "adamw"
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    clip: float | None = 1.0
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: int = 100  # steps
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    accumulate: int = Field(1, ge=1)


class DataSpec(BaseModel):
    """One source of items: a reader by name; every other key but ``weight`` is an argument of the reader."""

    model_config = ConfigDict(extra="allow")
    format: str
    weight: float = Field(1.0, gt=0)

    def options(self) -> dict[str, Any]:
        """Return the arguments of the reader."""
        return dict(self.__pydantic_extra__ or {})


class Data(Spec):
    """What is trained on, and what the validation loss is computed on."""

    train: DataSpec | list[DataSpec] | None = None
    val: DataSpec | list[DataSpec] | None = None


class InitSpec(Spec):
    """Trained parts taken from another run."""

    model_config = ConfigDict(extra="forbid", populate_by_name=True)
    source: str | None = Field(None, alias="from")
    parts: list[str] = []


class FitSpec(Spec):
    """A closed-form fit of one part: no gradient."""

    part: Literal["connector"] = "connector"
    solver: Literal["ridge"] = "ridge"
    targets: Literal["caption-words"] = "caption-words"
    strength: float = Field(0.01, gt=0)  # of the ridge, as a share of the features' mean variance


class ObjectiveSpec(PartSpec):
    """A loss by its registry name, and its weight in the stage's sum."""

    weight: float = 1.0


class EvalSpec(Spec):
    """Suites to run, and how often while training (steps; null: after it)."""

    suites: list[str] = []
    every: int | None = None


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
    seed: int = 0


class AssemblySpec(Spec):
    """What a model is built from: the part of a recipe that is saved with the trained tensors."""

    encoder: EncoderSpec
    lm: LMSpec
    connector: PartSpec
    prompt: PromptSpec = PromptSpec()
    decoding: dict[str, Any] = {"max_new_tokens": 20}
    seed: int = 0


class Stage(Settings):
    """One stage: the recipe's settings with the stage's own over them, and what is fitted or trained."""

    name: str
    fit: FitSpec | None = None
    train: dict[str, float] = {}  # part, or dotted path inside one -> learning rate
    objectives: list[ObjectiveSpec] = [ObjectiveSpec(type="caption")]
    steps: int | None = Field(None, ge=1)
    batch_size: int = Field(32, ge=1)
    validate_every: int | None = Field(None, ge=1)  # steps

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
        return self


class Recipe(Settings):
    """A whole recipe, checked; ``stages`` are resolved (each carries every setting)."""

    name: str
    about: str = ""  # one line, shown by `mllm recipes`
    stages: list[Stage] = []

    def assembly(self, stage: Stage) -> AssemblySpec:
        """Return what a stage's model is built from.

        Raises:
            MLLMError: a part is not named.
        """
        missing = [part for part in ("encoder", "lm", "connector") if getattr(stage, part) is None]
        if missing:
            raise MLLMError(f"The recipe {self.name} names no {' and no '.join(missing)}.")
        shared = {key: getattr(stage, key) for key in AssemblySpec.model_fields if key != "seed"}
        return AssemblySpec(**shared, seed=self.seed)


def find(name: str) -> Path:
    """Return the file of a recipe, given its name or a path to it.

    Raises:
        MLLMError: no such recipe; the near matches are listed.
    """
    if name.endswith((".yaml", ".yml")) or "/" in name:
        if not Path(name).is_file():
            raise MLLMError(f"There is no recipe file {name!r}. Give a path to a YAML file, or a name of `mllm recipes`.")
        return Path(name)
    path = Path(str(files("mllm.recipes"))) / f"{name}.yaml"
    if not path.is_file():
        raise MLLMError(f"No recipe is called {name!r}. {near(name, names())}")
    return path


def names() -> list[str]:
    """Return the names of the recipes that come with the package."""
    return sorted(path.stem for path in Path(str(files("mllm.recipes"))).glob("*.yaml"))


def load(name: str, overrides: Mapping[str, Any] | Sequence[str] = ()) -> Recipe:
    """Read the recipe ``name`` (a name or a path), apply dotted overrides, and check it.

    Args:
        name: a recipe's name or a path to a YAML file.
        overrides: ``{"connector.type": "mlp"}`` or ``["connector.type=mlp"]``; a list index is a number:
            ``stages.1.steps=50``.

    Raises:
        MLLMError: no such file, not YAML, an unknown key or a wrong type (all of them are listed).
    """
    config = _read(find(name), seen=())
    for key, value in _pairs(overrides):
        _override(config, key, value)
    return check(OmegaConf.to_container(config, resolve=True), label=name)


def check(values: Any, label: str) -> Recipe:
    """Check a recipe's plain mapping and resolve its stages."""
    shared = {key: value for key, value in values.items() if key not in ("name", "about", "stages", "extends")}
    stages = [
        OmegaConf.to_container(OmegaConf.merge(OmegaConf.create(shared), OmegaConf.create(stage)))
        for stage in values.get("stages") or []
    ]
    known = {key: value for key, value in values.items() if key != "extends"}
    return checked(Recipe, {**known, "stages": stages}, label=f"Recipe {label}")


def checked(model: type[Model], values: Any, label: str = "These settings do not fit") -> Model:
    """Return ``values`` as a checked ``model``.

    Raises:
        MLLMError: every problem on a line of its own, with the key, the value and the near match.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise MLLMError(f"{label}:\n" + "\n".join(_explain(model, error))) from None


def dump(recipe: Recipe) -> str:
    """Return the resolved recipe as YAML; `load` reads it back to the same recipe."""
    return OmegaConf.to_yaml(OmegaConf.create(recipe.model_dump(mode="json", by_alias=True)), sort_keys=False)


def _read(path: Path, seen: tuple[Path, ...]) -> DictConfig:
    """Read one file and what it extends."""
    if path in seen:
        raise MLLMError(f"{path}: 'extends' goes in a circle: {' -> '.join(p.stem for p in (*seen, path))}.")
    try:
        config = OmegaConf.load(path)
    except (YAMLError, OmegaConfBaseException) as error:
        raise MLLMError(f"{path} is not a YAML file: {error}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise MLLMError(f"{path} cannot be read: {error}") from None
    if not isinstance(config, DictConfig):
        raise MLLMError(f"{path} holds no mapping. A recipe has keys such as 'encoder', 'lm' and 'stages'.")
    base = config.get("extends")
    if base is None:
        return config
    sibling = path.parent / base
    merged = OmegaConf.merge(_read(sibling if sibling.is_file() else find(base), (*seen, path)), config)
    assert isinstance(merged, DictConfig)
    return merged


def _pairs(overrides: Mapping[str, Any] | Sequence[str]) -> list[tuple[str, Any]]:
    if isinstance(overrides, Mapping):
        return list(overrides.items())
    pairs = []
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise MLLMError(f"The override {text!r} is not of the form key=value, for example stages.1.steps=50.")
        pairs.append((key, OmegaConf.create(f"value: {value}").value if value else None))
    return pairs


def _override(config: DictConfig, key: str, value: Any) -> None:
    try:
        OmegaConf.update(config, key, value, merge=False)
    except (OmegaConfBaseException, IndexError, AssertionError, TypeError, ValueError) as error:
        raise MLLMError(f"The override {key}={value} does not fit the recipe: {error}") from None


def _explain(model: type[BaseModel], error: ValidationError) -> list[str]:
    """One line for each problem: the key, the value, what was expected, the near match."""
    lines = []
    for problem in error.errors():
        key = ".".join(str(step) for step in problem["loc"])
        if problem["type"] == "extra_forbidden":
            known = _siblings(model, problem["loc"])
            line = f"  {key}: unknown key. {near(str(problem['loc'][-1]), known)}"
        elif problem["type"] == "missing":
            line = f"  {key}: missing"
        else:
            line = f"  {key}: {problem['input']!r}: {problem['msg']}"
        lines.append(line)
    return lines


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
