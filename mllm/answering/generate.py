"""Answer prompts: read them, decode, and put the answers together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

from mllm.answering.decode import answer, decodings
from mllm.answering.in_words import told
from mllm.answering.rerank import reranked
from mllm.answering.with_images import shown
from mllm.errors import MLLMError
from mllm.media.images import source_of
from mllm.model import Model
from mllm.outputs import Output
from mllm.prompts.pieces import Control, Piece, arrange
from mllm.readout.tokens import can_draw

BATCH = 16


def generate(
    model: Model,
    prompts: Sequence[Sequence[Piece]],
    decoding: dict[str, Any],
    *,
    errors: Literal["raise", "return"] = "raise",
    index: Any = None,
    images: int = 1,
    eager: float = 0.0,
) -> list[Any]:
    """Answer interleaved prompts, in one batch; see `mllm.assembly.Model.generate`."""
    _check_list(prompts)
    prompts_read = [_read(model, pieces) for pieces in prompts]
    if errors == "raise":
        _raise_first(prompts_read)
    good = [prompt for prompt in prompts_read if not isinstance(prompt, MLLMError)]
    answers = iter(_answers(model, good, dict(decoding), index, images, eager) if good else [])
    return [prompt if isinstance(prompt, MLLMError) else next(answers) for prompt in prompts_read]


def _answers(
    model: Model, prompts: list[list[Piece]], decoding: dict[str, Any], index: Any, images: int, eager: float
) -> list[Output]:
    """Return the answers to prompts that were read, in the way that the settings ask for."""
    count = decoding.pop("candidates", model.spec.decoding.get("candidates", 1))
    words = decoding.pop("words", model.spec.decoding.get("words"))
    if words is not None and index is not None:
        raise MLLMError("Images told in words and answers with images do not go together: leave one out.")
    if words is not None:
        return told(model, prompts, words, decoding)
    if images and (index is not None or can_draw(model) or eager):
        if count > 1:
            raise MLLMError("Answers with images are not reranked: leave out 'candidates', or say images=0.")
        return shown(model, prompts, decodings(model, prompts, decoding), index, count=images, eager=eager)
    if count > 1:
        return reranked(model, prompts, count, decoding)
    return answer(model, prompts, decodings(model, prompts, decoding))


def answer_each(model: Model, images: Sequence[Any], text: str, **options: Any) -> Iterator[Output | MLLMError]:
    """Yield the answer to each image, in order; of one that cannot be read, the error.

    Args:
        model: the assembly.
        images: in any accepted form.
        text: what stands with each, for example the recipe's caption prompt.
        options: what `mllm.assembly.Model.generate` takes.
    """
    template = model.spec.prompt.template
    show = {name: options.pop(name) for name in ("index", "images", "eager") if name in options}
    for start in range(0, len(images), BATCH):
        # A path as text would be text: what is an image here is made one.
        prompts = [arrange(template, [source_of(image)], text) for image in images[start : start + BATCH]]
        yield from generate(model, prompts, options, errors="return", **show)


def read(model: Model, prompts: Sequence[Sequence[Piece]]) -> list[list[Piece]]:
    """Return prompts with their images opened and their lengths checked.

    Raises:
        MLLMError: no list of prompts, or the first prompt that cannot be read; where there are several, it is named.
    """
    _check_list(prompts)
    return _raise_first([_read(model, pieces) for pieces in prompts])


def _check_list(prompts: Sequence[Sequence[Piece]]) -> None:
    if isinstance(prompts, str) or not prompts:
        raise MLLMError("Expected a list of prompts, each a list of texts and images: [['A picture of', image]].")


def _raise_first(read: Sequence[list[Piece] | MLLMError]) -> list[list[Piece]]:
    """Raise the first error among prompts that were read; where there are several prompts, say which it is."""
    for index, prompt in enumerate(read):
        if isinstance(prompt, MLLMError):
            raise MLLMError(f"Prompt {index}: {prompt}" if len(read) > 1 else str(prompt))
    return [prompt for prompt in read if not isinstance(prompt, MLLMError)]


def _read(model: Model, pieces: Any) -> list[Piece] | MLLMError:
    """Return a prompt with its images opened and its length checked, or what is wrong with it."""
    try:
        if (
            isinstance(pieces, str)
            or not isinstance(pieces, Sequence)
            or all(isinstance(piece, str) and not piece for piece in pieces)
        ):
            raise MLLMError(f"The prompt is {pieces!r}: expected a list of texts and images, not empty.")
        model.encode(pieces)
        return [piece if isinstance(piece, str | Control) else model.encoder.open(piece) for piece in pieces]
    except MLLMError as error:
        return error
