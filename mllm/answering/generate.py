"""Answer prompts: read them, make their decoding, and answer them in the way that it asks for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from mllm.answering.decode import answer, for_encoded, make_decoding
from mllm.answering.entities import with_entities
from mllm.answering.in_words import answer_in_words
from mllm.answering.rerank import answer_best
from mllm.answering.with_images import answer_with_images
from mllm.errors import MLLMError, renamed_options
from mllm.lms.decoding import Decoding
from mllm.media.images import source_of
from mllm.model import Model
from mllm.outputs import Output
from mllm.prompts.formatting import formatted
from mllm.prompts.pieces import Piece, is_image
from mllm.readout.tokens import can_draw
from mllm.scorers.index import ImageIndex

BATCH = 16
FORMER = {"eager": "image_logit_bias"}


def generate(
    model: Model,
    prompts: Sequence[Sequence[Piece]],
    options: Mapping[str, Any],
    *,
    errors: Literal["raise", "return"] = "raise",
    index: str | Path | ImageIndex | None = None,
    images: int = 1,
    image_logit_bias: float = 0.0,
) -> list[Any]:
    """Answer interleaved prompts, in one batch; see `mllm.assembly.Assembly.generate`."""
    options = renamed_options(options, FORMER)
    image_logit_bias = options.pop("image_logit_bias", image_logit_bias)
    decoding = make_decoding(model, options)
    return answer_prompts(
        model, prompts, decoding, errors=errors, index=index, images=images, image_logit_bias=image_logit_bias
    )


def answer_prompts(
    model: Model,
    prompts: Sequence[Sequence[Piece]],
    decoding: Decoding,
    *,
    errors: Literal["raise", "return"] = "raise",
    index: str | Path | ImageIndex | None = None,
    images: int = 1,
    image_logit_bias: float = 0.0,
) -> list[Any]:
    """Answer interleaved prompts with a decoding; the rest is as in `mllm.assembly.Assembly.generate`."""
    _check_list(prompts)
    prompts_read = [_read(model, pieces, decoding) for pieces in prompts]
    if errors == "raise":
        _raise_first(prompts_read)
    good = [prompt for prompt in prompts_read if not isinstance(prompt, MLLMError)]
    answers = iter(_answers(model, good, decoding, index, images, image_logit_bias) if good else [])
    return [prompt if isinstance(prompt, MLLMError) else next(answers) for prompt in prompts_read]


def _answers(
    model: Model,
    prompts: list[list[Piece]],
    decoding: Decoding,
    index: str | Path | ImageIndex | None,
    images: int,
    image_logit_bias: float,
) -> list[Output]:
    """Return the answers to prompts that were read, in the way that the decoding asks for."""
    if decoding.nearest_words is not None and index is not None:
        raise MLLMError("'nearest_words' and answers with images cannot be combined: leave one out.")
    if decoding.nearest_words is not None:
        return answer_in_words(model, prompts, decoding)
    if images and (index is not None or can_draw(model) or image_logit_bias):
        if decoding.candidates > 1:
            raise MLLMError("Answers with images are not reranked: leave out 'candidates', or set images=0.")
        decodings = [decoding] * len(prompts)
        return answer_with_images(model, prompts, decodings, index, count=images, image_logit_bias=image_logit_bias)
    if decoding.candidates > 1:
        return answer_best(model, prompts, decoding)
    return answer(model, prompts, [decoding] * len(prompts))


def answer_each(
    model: Model,
    images: Sequence[Any],
    text: str,
    *,
    index: str | Path | ImageIndex | None = None,
    image_logit_bias: float = 0.0,
    **options: Any,
) -> Iterator[Output | MLLMError]:
    """Yield the answer to each image, in order; for one that cannot be read, the error.

    Args:
        model: the model.
        images: in any accepted form.
        text: the text of each prompt, for example the recipe's caption prompt.
        index: as in `mllm.assembly.Assembly.generate`.
        image_logit_bias: the same.
        options: of the decoding.
    """
    for start in range(0, len(images), BATCH):
        # In a prompt a path given as a `str` would be text.
        prompts = [formatted(model.spec.prompt, [source_of(image)], text) for image in images[start : start + BATCH]]
        yield from generate(model, prompts, options, errors="return", index=index, image_logit_bias=image_logit_bias)


def read(model: Model, prompts: Sequence[Sequence[Piece]]) -> list[list[Piece]]:
    """Return prompts with their images opened and their lengths checked.

    Raises:
        MLLMError: no list of prompts, or the first prompt that cannot be read; of several prompts it is named.
    """
    _check_list(prompts)
    return _raise_first([_read(model, pieces) for pieces in prompts])


def _check_list(prompts: Sequence[Sequence[Piece]]) -> None:
    if isinstance(prompts, str) or not prompts:
        raise MLLMError("Expected a list of prompts, each a list of texts and images: [['A picture of', image]].")


def _raise_first(prompts_read: Sequence[list[Piece] | MLLMError]) -> list[list[Piece]]:
    """Raise the first error among prompts that were read; of several prompts it names the one."""
    for index, prompt in enumerate(prompts_read):
        if isinstance(prompt, MLLMError):
            raise MLLMError(f"Prompt {index}: {prompt}" if len(prompts_read) > 1 else str(prompt))
    return [prompt for prompt in prompts_read if not isinstance(prompt, MLLMError)]


def _read(model: Model, pieces: Any, decoding: Decoding | None = None) -> list[Piece] | MLLMError:
    """Return a prompt with its images opened and its length checked, that of its answer included, or the error."""
    try:
        if (
            isinstance(pieces, str)
            or not isinstance(pieces, Sequence)
            or all(isinstance(piece, str) and not piece for piece in pieces)
        ):
            raise MLLMError(f"The prompt is {pieces!r}: expected a list of texts and images, not empty.")
        pieces = with_entities(model, pieces)
        encoded = model.encode(pieces)
        if decoding is not None and decoding.nearest_words is None:  # which makes other prompts
            for_encoded(model, encoded, decoding)
        return [model.encoder.open(piece) if is_image(piece) else piece for piece in pieces]
    except MLLMError as error:
        return error
