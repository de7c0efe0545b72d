"""The same words to many pictures, in batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from mllm.errors import MLLMError
from mllm.images import open_image
from mllm.prompt import arrange

BATCH = 16


def answer_each(model: Any, images: Sequence[Any], text: str, **decoding: Any) -> Iterator[str | MLLMError]:
    """Yield what the model says to each picture, in order; of one that cannot be read, the error.

    Args:
        model: the assembly.
        images: pictures in any accepted form.
        text: what stands with each, for example the recipe's caption prompt.
        decoding: fields of `transformers.GenerationConfig`.
    """
    for start in range(0, len(images), BATCH):
        found = [_opened(image) for image in images[start : start + BATCH]]
        good = [image for image in found if not isinstance(image, MLLMError)]
        prompts = [arrange(model.spec.prompt.template, [image], text) for image in good]
        answers = iter(model.generate(prompts, **decoding) if prompts else [])
        yield from (image if isinstance(image, MLLMError) else str(next(answers)) for image in found)


def _opened(image: Any) -> Any:
    try:
        return open_image(image)
    except MLLMError as error:
        return error
