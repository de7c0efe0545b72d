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
        return [f"probes/{1 if image.size == NOISE.size else 2}.png" for image in self.images]

    def written(self, processor: Any) -> str:
        """Return the prompt as a text, with ``<image>`` for an image."""
        if self.text is not None:
            return self.text
        return str(processor.apply_chat_template(self.messages, add_generation_prompt=True))


def make_probes(model: Model) -> list[list[Probe]]:
    """Return prompts in the recipe's words, and conversations that the model takes; they have several lengths."""
    first, second = NOISE, GRADIENT
    prompt = model.spec.prompt
    question = prompt.question.format(question=QUESTION)
    prompts = [
        formatted(prompt, [first], prompt.caption),
        formatted(prompt, [second], question),
        formatted(prompt, [first, second], question),
    ]
    texts = [
        Probe(pieces, "".join(piece if isinstance(piece, str) else IMAGE for piece in pieces)) for pieces in prompts
    ]
    return [kind for kind in (texts, _conversations(model)) if kind]


def inputs_of(processor: Any, probes: Sequence[Probe]) -> Any:
    """Return probes of one kind as the processor's padded batch."""
    if probes[0].text is not None:
        images, texts = [probe.images for probe in probes], [probe.text for probe in probes]
        return processor(images=images, text=texts, padding=True, return_tensors="pt")
    return processor.apply_chat_template(
        [probe.messages for probe in probes],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True},
    )


def save_images(folder: Path) -> None:
    """Write the probes' images into a folder."""
    (folder / "probes").mkdir()
    for number, image in enumerate((NOISE, GRADIENT), start=1):
        image.save(folder / "probes" / f"{number}.png")


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


def _images() -> list[Image.Image]:
    """Return an image of noise and one of a color gradient, which are not square."""
    random = np.random.default_rng(0)
    noise = random.integers(0, 256, (90, 120, 3), dtype=np.uint8)
    rows, columns = np.mgrid[0:150, 0:100]
    gradient = np.stack([rows, columns, rows + columns], axis=-1).astype(np.uint8)
    return [Image.fromarray(noise), Image.fromarray(gradient)]


NOISE, GRADIENT = _images()
