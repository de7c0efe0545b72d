"""Answer prompts: read them, decode, and put the answers together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from mllm.errors import MLLMError
from mllm.media.images import source_of
from mllm.outputs import Output
from mllm.prompts.pieces import arrange

BATCH = 16


def answer_each(model: Any, images: Sequence[Any], text: str, **decoding: Any) -> Iterator[Output | MLLMError]:
    """Yield what the model says to each picture, in order; of one that cannot be read, the error.

    Args:
        model: the assembly.
        images: pictures in any accepted form.
        text: what stands with each, for example the recipe's caption prompt.
        decoding: what `mllm.model.Assembly.generate` takes.
    """
    template = model.spec.prompt.template
    for start in range(0, len(images), BATCH):
        # A path as text would be text: what is a picture here is made one.
        prompts = [arrange(template, [source_of(image)], text) for image in images[start : start + BATCH]]
        yield from model.generate(prompts, errors="return", **decoding)
