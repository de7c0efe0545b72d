"""Define the keys of a recipe, their types and defaults, which pydantic checks."""

from __future__ import annotations

import itertools
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    ByteSize,
    Field,
    PrivateAttr,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from mllm.config.base import PartSpec, Spec
from mllm.config.data import Data
from mllm.config.fit import FitSpec, InitSpec, ObjectiveSpec
from mllm.config.parts import (
    FROZEN,
    PARTS,
    SCORER,
    AssemblySpec,
    Name,
    Parts,
    listed,
    part_of,
    switch,
)
from mllm.config.suites import EvalSpec

LIMIT = ByteSize(4 * 2**30)  # of cached features: on disk with cache: auto, and in memory

Beta = Annotated[float, Field(ge=0, lt=1)]
Rate = Annotated[float, Field(ge=0)]


class OptimSpec(Spec):
    """The optimizer and its schedule."""

    name: Literal["adamw", "adamw-8bit", "paged-adamw", "paged-adamw-8bit"] = "adamw"
    weight_decay: float = Field(default=0.0, ge=0)  # of matrices; vectors (biases, norms) are not decayed
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    clip: float | None = Field(default=1.0, gt=0)
    schedule: Literal["cosine", "linear", "constant", "step"] = "cosine"
    warmup: int = Field(default=100, ge=0)  # steps
    warmup_start: float = Field(default=0.0, ge=0)  # the learning rate that warmup begins with
    floor: float = Field(default=0.0, ge=0)  # the lowest learning rate that the schedule ends at
    horizon: int | None = Field(default=None, ge=1)  # the step at which the schedule ends; null: the stage's last
    milestones: list[Annotated[int, Field(ge=1)]] = []  # steps after which schedule: step multiplies by factor
    factor: float = Field(default=0.1, gt=0, le=1)
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    accumulate: int = Field(default=1, ge=1)
    layer_decay: float = Field(default=1.0, gt=0, le=1)  # learning rates of an encoder's block, over those of the next
    drop_path: float = Field(default=0.0, ge=0, lt=1)  # stochastic depth of an encoder that trains: of its last block
    checkpointing: bool = False  # recompute the language model's activations in the backward pass
    compile: bool = False  # torch.compile, of the language model's layers

    @model_validator(mode="after")
    def _fits_the_schedule(self) -> OptimSpec:
        if (self.schedule == "step") != bool(self.milestones):
            raise ValueError("schedule: step and milestones belong together: give both, or neither")
        if self.milestones != sorted(set(self.milestones)):
            raise ValueError(f"milestones: {self.milestones}: expected steps in ascending order, each once")
        if self.schedule == "constant" and (self.floor or self.horizon):
            raise ValueError("floor and horizon are of a schedule that falls: leave them out, or give another schedule")
        if self.schedule == "step" and self.horizon:
            raise ValueError("schedule: step ends at its last milestone: leave out horizon")
        return self


class CacheSpec(Spec):
    """The feature cache. A mode alone is short for a mapping: ``cache: on``."""

    mode: Annotated[Literal["auto", "on", "off"], BeforeValidator(switch)] = "auto"
    dtype: Literal["auto", "bfloat16"] = "auto"  # of the rows: as the encoder returns them, or rounded
    limit: Annotated[ByteSize, Field(gt=0)] | None = None  # bytes on disk; null: 4 GiB with auto, no limit with on
    memory: Annotated[ByteSize, Field(ge=2**20)] = LIMIT  # bytes in the memory of each process

    @model_validator(mode="before")
    @classmethod
    def _mode_alone(cls, values: Any) -> Any:
        return {"mode": values} if isinstance(values, str | bool) else values

    @model_serializer(mode="wrap")
    def _short(self, write: SerializerFunctionWrapHandler) -> Any:
        """Return the mode alone where nothing else is set: a run that was written before is resumed unchanged."""
        values: dict[str, Any] = write(self)
        return values if self != CacheSpec(mode=self.mode) else self.mode

    @property
    def bytes(self) -> int | None:
        """Return the most bytes on disk; None: there is no limit."""
        if self.mode == "off":
            return 0
        return LIMIT if self.limit is None and self.mode == "auto" else self.limit


def _no_scorer(guides: dict[str, PartSpec]) -> dict[str, PartSpec]:
    """Refuse a guide that is called as the scorer is."""
    if SCORER in guides:
        raise ValueError("the scorer is a guide by itself: give it as the recipe's own key, scorer: {type: ...}")
    return guides


Guides = Annotated[dict[Name, PartSpec], AfterValidator(_no_scorer)]


class Settings(Parts):
    """The settings of a recipe for all stages, which a stage may override."""

    guides: Guides = {}  # frozen models that a stage asks and its model does not contain, by name
    data: Data = Data()
    init: InitSpec = InitSpec()
    optim: OptimSpec = OptimSpec()
    cache: CacheSpec = CacheSpec()
    eval: EvalSpec = EvalSpec()
    track: Annotated[
        list[Literal["tensorboard", "trackio", "wandb"]], BeforeValidator(listed)
    ] = []  # where losses are logged, too


class Stage(Settings):
    """One stage: the recipe's settings, overridden by the stage's, and what is fitted or trained."""

    name: Name
    fit: FitSpec | None = None
    train: dict[str, Rate] = {}  # part, or dotted path inside one -> learning rate
    objectives: list[ObjectiveSpec] = [ObjectiveSpec(type="caption")]
    steps: int | None = Field(default=None, ge=1)
    epochs: float | None = Field(default=None, gt=0)  # in place of steps: passes over the data (mllm.data.epochs)
    batch_size: int = Field(default=32, ge=1)
    validate_every: int | None = Field(default=None, ge=1)  # steps
    keep: Literal["last", "best"] = "last"  # best: the stage ends with the tensors of the lowest validation loss
    patience: int | None = Field(default=None, ge=1)  # stop after so many validations without a lower loss
    checkpoint_every: int | None = Field(default=100, ge=1)  # steps; a killed run continues from the last one
    checkpoint_minutes: float | None = Field(default=None, gt=0)  # the most between two checkpoints
    keep_checkpoints: int = Field(default=1, ge=1)  # of the last ones, until the run is complete
    _before: AssemblySpec | None = PrivateAttr(default=None)  # the model of the stage before

    @model_validator(mode="before")
    @classmethod
    def _train_list(cls, values: Any) -> Any:
        """``train: [connector]`` is short for the default learning rate."""
        if isinstance(values, dict) and isinstance(paths := values.get("train"), list):
            if not all(isinstance(path, str) for path in paths):
                raise ValueError(f"train: {paths}: expected the paths of parts, such as [connector]")
            values = {**values, "train": dict.fromkeys(paths, 2.0e-4)}
        return values

    @model_validator(mode="after")
    def _one_kind(self) -> Stage:
        if bool(self.fit) == bool(self.train):
            raise ValueError("a stage has either 'fit' or 'train': give one of the two")
        if self.train and (self.steps is None) == (self.epochs is None):
            raise ValueError("a stage that trains needs 'steps' or 'epochs': give one of the two")
        if self.fit and self.epochs is not None:
            raise ValueError("'fit' reads its data once: leave out epochs")
        if self.checkpoint_every is None and self.checkpoint_minutes is None:
            raise ValueError("checkpoint_every: null needs checkpoint_minutes")
        if self.train and self.data.augment and self.cache.mode == "on":
            raise ValueError(
                "data.augment changes images in every step, so features are not cached: leave out cache: on"
            )
        if self.train and (self.optim.layer_decay < 1 or self.optim.drop_path) and not self.trains("encoder"):
            raise ValueError(
                "optim.layer_decay and drop_path are for an encoder that trains: give train: {encoder: ...}"
            )
        if (self.keep == "best" or self.patience) and not (self.validate_every and self.data.val):
            raise ValueError("keep: best and patience go by the validation loss: give validate_every and data.val")
        return self

    @model_serializer(mode="wrap")
    def _without_later_keys(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out the defaults of later keys: a recipe is written as it was before there were any."""
        values: dict[str, Any] = write(self)
        later = {"epochs": None, "checkpoint_minutes": None, "keep_checkpoints": 1}
        return {key: value for key, value in values.items() if key not in later or value != later[key]}

    @property
    def assembly(self) -> AssemblySpec:
        """Return the specification of the stage's model, with what earlier stages and this one train."""
        parts = {key: getattr(self, key) for key in Parts.model_fields}
        paths = [*self.train, *([self.fit.part] if self.fit else [])]
        spec = AssemblySpec(**parts, trained=[path for path in paths if part_of(path) in FROZEN])
        return spec if self._before is None else spec.following(self._before)

    @property
    def feature_cache(self) -> CacheSpec:
        """Return ``cache``; its mode is ``off`` where the features of an image change from step to step."""
        changing = self.trains("encoder") or (self.train and self.data.augment is not None)
        return CacheSpec(mode="off") if changing else self.cache

    def trains(self, part: str) -> bool:
        """Whether the stage trains a part by gradient, or something inside it."""
        return part in map(part_of, self.train)

    def sets(self, part: str) -> bool:
        """Whether the stage trains a part, fits it, or takes it from another run: it is more than initialized then."""
        fitted = [self.fit.part] if self.fit else []
        taken = (self.init.parts or PARTS) if self.init.source else ()
        return part in map(part_of, (*self.train, *fitted, *taken))


class Recipe(Settings):
    """A whole recipe, checked; ``stages`` are resolved: each has every setting."""

    name: Name
    about: str = ""  # one line, shown by `mllm recipes`
    paper: str = ""  # arXiv:NUMBER
    needs: Annotated[list[str], BeforeValidator(listed)] = []  # recipes whose runs this one names (runs/NAME)
    stages: list[Stage] = []

    @model_serializer(mode="wrap")
    def _without_no_needs(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out needs that are not there: a run that was written before is resumed unchanged."""
        values: dict[str, Any] = write(self)
        return {key: value for key, value in values.items() if key != "needs" or value}

    @model_validator(mode="after")
    def _in_order(self) -> Recipe:
        """Let each stage, which has a name of its own, know the model of the stage before."""
        names = [stage.name for stage in self.stages]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"two stages are called {twice!r}: give one of them another name")
        for before, stage in itertools.pairwise(self.stages):
            stage._before = before.assembly
        return self
