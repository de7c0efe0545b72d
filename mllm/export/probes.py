"""Define the probes: prompts and conversations that an exported model and the original both answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mllm.errors import MLLMError
from mllm.export.stock import IMAGE
from mllm.media.images import open_image
from mllm.model import Model
from mllm.prompts.formatting import formatted
from mllm.prompts.messages import checked_messages, message, text_part, turns
from mllm.prompts.pieces import Piece, images_of

QUESTION = "What is in the picture?"


@dataclass(frozen=True)
class Probe:
    """A prompt, or a conversation, as this model and as the transformers processor take it.

    Attributes:
        pieces: as this model takes it.
        text: the prompt for the processor; None for a conversation.
        messages: the conversation for the processor.
    """

    pieces: Sequence[Piece]
    text: str | None = None
    messages: Sequence[dict[str, Any]] = ()

    @property
    def images(self) -> list[Image.Image]:
        """Return the images in order."""
        return [open_image(image) for image in images_of(self.pieces)]

    @property
    def files(self) -> list[str]:
        """Return the images' files in the exported folder."""
        return [file_of(image) for image in self.images]

    def written(self, processor: Any) -> str:
        """Return the prompt as a text, with ``<image>`` for an image."""
        if self.text is not None:
            return self.text
        return str(processor.apply_chat_template(self.messages, add_generation_prompt=True))


def make_probes(model: Model, *, several: bool = True) -> list[list[Probe]]:
    """Return prompts in the recipe's words, and conversations that the model takes; they have several lengths.

    Args:
        model: the model.
        several: whether there are conversations with several images.

    Raises:
        MLLMError: not one of them fits the language model's context.
    """
    first, second, *larger = images_for(model)
    prompt = model.spec.prompt
    question = prompt.question.format(question=QUESTION)
    prompts = [
        formatted(prompt, [first], prompt.caption),
        formatted(prompt, [second], question),
        formatted(prompt, [first, second], question),
        *(formatted(prompt, [image], question) for image in larger),
    ]
    texts = [
        Probe(pieces, "".join(piece if isinstance(piece, str) else IMAGE for piece in pieces)) for pieces in prompts
    ]
    talks = [probe for probe in _conversations(model) if several or len(probe.images) == 1]
    if model.tiling is not None:
        texts, talks = ([probe for probe in kind if _fits(model, probe)] for kind in (texts, talks))
    if not texts and not talks:
        raise MLLMError(
            f"The language model's context of {model.lm.context} tokens is too short for the tiles of an image, so "
            "nothing can be compared. Cut images into fewer tiles (encoder.tiles), or take another language model."
        )
    return [kind for kind in (texts, talks) if kind]


def images_for(model: Model) -> list[Image.Image]:
    """Return the images of the probes: two small ones, and of tiles one that has many, or whose tokens are reduced."""
    if (tiling := model.tiling) is None:
        return [NOISE, GRADIENT]
    grid, layouts = model.connector.token_grid, tiling.fullest
    layout = next((each for each in layouts if grid is not None and each.reduced(grid)), layouts[-1])
    return [NOISE, GRADIENT, _gradient(*layout.size)]


def file_of(image: Image.Image) -> str:
    """Return the file of a probe's image in the exported folder."""
    return f"probes/{image.width}x{image.height}.png"


def _fits(model: Model, probe: Probe) -> bool:
    """Whether the language model's context has room for a probe."""
    try:
        model.encode(probe.pieces)
    except MLLMError:
        return False
    return True


def inputs_of(processor: Any, probes: Sequence[Probe]) -> Any:
    """Return probes of one kind as the processor's padded batch.

    The images of prompts are one list: of nested lists, that of LLaVA-OneVision cuts no image that is one of several.
    """
    if probes[0].text is not None:
        images, texts = [image for probe in probes for image in probe.images], [probe.text for probe in probes]
        return processor(images=images, text=texts, padding=True, return_tensors="pt")
    return processor.apply_chat_template(
        [probe.messages for probe in probes],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True},
    )


def save_images(folder: Path, model: Model) -> None:
    """Write the probes' images into a folder."""
    (folder / "probes").mkdir()
    for image in images_for(model):
        image.save(folder / file_of(image))


def _conversations(model: Model) -> list[Probe]:
    """Return conversations, without those that the model's chat template refuses."""
    first, second = ({"type": "image", "image": image} for image in (NOISE, GRADIENT))
    question, more = text_part(QUESTION), text_part("Look:")
    answered = [message("user", [more, first, question]), message("assistant", [text_part("A house.")])]
    conversations = [
        [message("user", [first, question])],
        [*answered, message("user", [text_part("And this?"), second])],
        [message("system", [text_part("Be brief.")]), message("user", [second, first, text_part("Compare them.")])],
    ]
    probes = []
    for messages in conversations:
        try:
            probes.append(Probe(turns(model, checked_messages(messages)), messages=messages))
        except MLLMError:  # a template without a system message, for example
            continue
    return probes


def _noise(width: int, height: int) -> Image.Image:
    random = np.random.default_rng(0)
    return Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8))


def _gradient(width: int, height: int) -> Image.Image:
    rows, columns = np.mgrid[0:height, 0:width]
    return Image.fromarray(np.stack([rows, columns, rows + columns], axis=-1).astype(np.uint8))


NOISE, GRADIENT = _noise(120, 90), _gradient(100, 150)  # which are not square
