"""What a recipe may say: its keys, their types and their defaults, checked by pydantic."""

from __future__ import annotations

import itertools
from typing import Any, Literal

from pydantic import (
    Field,
    model_validator,
)

from mllm.config.data import Data
from mllm.config.parts import (
    FROZEN,
    AssemblySpec,
    EncoderSpec,
    FitSpec,
    Heads,
    InitSpec,
    LMSpec,
    ObjectiveSpec,
    PartSpec,
    PromptSpec,
    Spec,
)


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
    heads: Heads = []
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
