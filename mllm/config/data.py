"""Define the keys of a recipe's data: the sources, their types and defaults."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

from mllm.config.base import Spec
from mllm.config.parts import listed
from mllm.config.prompt import OWN_WORDS, PromptSpec
from mllm.errors import near


class DataSpec(BaseModel):
    """One source of items: a reader by name, and how its items are read; other keys are arguments of the reader."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)
    format: str
    weight: float = Field(default=1.0, gt=0)  # how often it is sampled, relative to other sources
    fraction: float = Field(default=1.0, gt=0, le=1)  # of the items, by the seed; a smaller one is a subset of a larger
    concatenate: float = Field(default=0.0, ge=0, le=1)  # how often another pair precedes one (FROMAGe, GILL)
    blank: bool = False  # images are black: what is learned without them
    answer: int | None = None  # the number of the answer that is used, below 0 from the end; null: each, one at a time
    shots: int = Field(default=0, ge=0)  # solved examples before each item, which are no targets
    prompt: dict[str, Any] = {}  # of its training examples, over the recipe's prompt format, such as caption: ""
    caption_split: Literal["random"] | None = None  # a caption's words before a random one belong to the prompt
    unlabeled: bool = False  # answers are left out, for what is learned from images alone
    see: Literal["image", "text"] = "image"  # text: an item's caption stands in its image's place; no image is opened

    @model_validator(mode="after")
    def _one_way(self) -> DataSpec:
        if self.shots and self.concatenate:
            raise ValueError("a source has either 'shots' or 'concatenate': give one of the two")
        if self.unlabeled and (self.shots or self.concatenate or self.caption_split or self.answer is not None):
            raise ValueError("unlabeled: true leaves none for 'answer', 'shots', 'concatenate' and 'caption_split'")
        if self.blank and self.see == "text":
            raise ValueError("a source has either 'blank' or 'see: text': give one of the two")
        return self

    @field_validator("prompt")
    @classmethod
    def _of_the_format(cls, prompt: dict[str, Any]) -> dict[str, Any]:
        """Refuse what is no part of a prompt format, when the recipe is read."""
        if unknown := sorted(prompt.keys() - PromptSpec.model_fields.keys()):
            raise ValueError(f"{unknown[0]}: unknown key. {near(unknown[0], PromptSpec.model_fields)}")
        PromptSpec.model_validate(prompt)
        return prompt

    @model_serializer(mode="wrap")
    def _without_none(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out what is not given of later keys: a run that was written before is resumed unchanged."""
        values: dict[str, Any] = write(self)
        later: dict[str, Any] = {"answer": None, "prompt": {}, "caption_split": None}
        later |= {"unlabeled": False, "see": "image"}
        return {key: value for key, value in values.items() if key not in later or value != later[key]}

    def prompt_over(self, prompt: PromptSpec) -> PromptSpec:
        """Return the prompt format of this source's training examples, given the recipe's."""
        if not self.prompt:
            return prompt
        values = prompt.model_dump()
        replaced = set(OWN_WORDS) if "turn" in self.prompt else {"turn"} if set(OWN_WORDS) & set(self.prompt) else set()
        kept = {key: value for key, value in values.items() if key not in replaced}
        return PromptSpec.model_validate({**kept, **self.prompt})

    def options(self) -> dict[str, Any]:
        """Return the arguments of the reader."""
        return dict(self.__pydantic_extra__ or {})

    @property
    def label(self) -> str:
        """Return a few words for plots and tables: the reader, with its task and file where it has them."""
        options = self.options()
        file = str(options.get("path", "")).rstrip("/").rpartition("/")[2]
        return " ".join(filter(None, (self.format, options.get("task"), file)))


Area = Annotated[float, Field(gt=0, le=1)]  # share of an image's


class AugmentSpec(Spec):
    """Random changes of training images, drawn from the seed and the example's position in the stream."""

    crop: tuple[Area, Area] | None = None  # keep a rectangle of this share of the area: at least, and at most
    flip: float = Field(default=0.0, ge=0, le=1)  # how often an image is mirrored, left to right

    @model_validator(mode="after")
    def _in_order(self) -> AugmentSpec:
        if self.crop and self.crop[0] > self.crop[1]:
            raise ValueError(f"crop: {list(self.crop)}: expected the smallest area first")
        return self


Sources = Annotated[list[DataSpec], BeforeValidator(listed)]


class Data(Spec):
    """The training data, and the data of the validation loss."""

    train: Sources = []
    val: Sources = []
    skip: float = Field(default=0.01, ge=0, le=1)  # share of the training items that may be unreadable
    max_length: int | None = Field(default=None, ge=8)  # tokens of an example, images included
    truncate: Literal["drop", "text"] = "drop"  # a longer one is left out, or loses text at its end
    answer_length: int | None = Field(default=None, ge=1)  # tokens of an answer; a longer one loses text at its end
    augment: AugmentSpec | None = None  # of the training images; features are then computed each time
    group_by_length: int | None = Field(default=None, ge=2)  # batches that are sampled together and sorted by length
    pack: int | None = Field(default=None, ge=8)  # tokens of a row that holds several examples

    @model_validator(mode="after")
    def _images_to_change(self) -> Data:
        if self.augment and any(source.see == "text" for source in self.train):
            raise ValueError("augment changes images, and a source has 'see: text': leave out one of the two")
        return self
