"""Write a conversation in the language model's chat template: the tokens that the template gives, images apart.

Notable: the template is filled with the texts themselves, since templates look at them: they trim, capitalize, and take
thinking out. A second rendering, with unguessable marks inside every text, says which characters are whose.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Sequence
from typing import Any

from mllm.config.prompt import PromptSpec
from mllm.errors import MLLMError
from mllm.prompts.pieces import Given, Piece, Target, Template
from mllm.prompts.places import Place, places
from mllm.prompts.rendering import Form, Renderer, Unfit

Range = tuple[int, int]


def uses_template(prompt: PromptSpec, lm: Any) -> bool:
    """Whether conversations are in the language model's chat template.

    Raises:
        MLLMError: the recipe asks for it, and there is none.
    """
    tokenizer = getattr(lm, "tokenizer", None)  # None where a model is planned without its files
    if prompt.chat == "plain" or tokenizer is None:
        return False
    if prompt.chat == "own" and tokenizer.chat_template is None:
        raise MLLMError("This language model has no chat template: set prompt.chat=plain.")
    return tokenizer.chat_template is not None


def templated(messages: Sequence[dict[str, Any]], prompt: PromptSpec, lm: Any, *, learn: bool = False) -> list[Piece]:
    """Return a conversation as an interleaved prompt in the language model's chat template.

    Args:
        messages: checked ones (`mllm.prompts.messages.checked_messages`).
        prompt: its ``chat_options`` are those of the template.
        lm: the language model.
        learn: as a training example, instead of a prompt that ends where the answer starts.

    Raises:
        MLLMError: the template refuses the conversation, or leaves a turn or an image out.
    """
    renderer, text, parts = filled(messages, prompt, lm, generation=not learn)
    learned, without_end = _learned(renderer, text, parts, lm) if learn else ([], set())
    return _pieces(text, parts, learned, without_end)


def end_of_turn(prompt: PromptSpec, lm: Any) -> int | None:
    """Return the id of the control token that ends an assistant's turn in the chat template.

    None: it has none, or conversations are not in a template.
    """
    if prompt.chat == "plain" or getattr(lm.tokenizer, "chat_template", None) is None:
        return None
    turns = [
        {"role": role, "content": [{"type": "text", "text": text}]}
        for role, text in (("user", "Yes?"), ("assistant", "No."), ("user", "Why?"))
    ]
    for count in (3, 2):  # some templates refuse a conversation that ends with the user's turn
        try:
            pieces = templated(turns[:count], prompt, lm, learn=True)
        except MLLMError:
            continue
        for piece, after in itertools.pairwise(pieces):
            if isinstance(piece, Target) and isinstance(after, Template) and after.learned:
                ids: list[int] = lm.tokenize(after.text, control=True)
                return ids[-1]
    return None


def filled(
    messages: Sequence[dict[str, Any]], prompt: PromptSpec, lm: Any, *, generation: bool
) -> tuple[Renderer, str, list[Place]]:
    """Return a conversation, rendered in the first form that the template takes, and the places of its parts.

    Raises:
        MLLMError: the template takes it in no form.
    """
    has_image = any(part["type"] == "image" for message in messages for part in message["content"])
    forms: tuple[Form, ...] = ("either", "parts", "text") if has_image else ("text", "parts")
    errors: list[Unfit] = []
    for form in forms:
        if has_image and form == "text" and any(error.refusal for error in errors) and _takes_images(prompt, lm):
            break  # in a text, the template would not know of the images for which it refuses the conversation
        try:
            return _in_form(form, messages, prompt, lm, generation=generation)
        except Unfit as error:
            errors.append(error)
    raise MLLMError(str(max(errors, key=lambda error: error.weight)))


def _takes_images(prompt: PromptSpec, lm: Any) -> bool:
    """Whether the template takes images as parts of a message."""
    turn = {"role": "user", "content": [{"type": "image", "image": object()}, {"type": "text", "text": "What is it?"}]}
    forms: tuple[Form, ...] = ("either", "parts")
    for form in forms:
        with contextlib.suppress(Unfit):
            _in_form(form, [turn], prompt, lm, generation=True)
            return True
    return False


def _in_form(
    form: Form, messages: Sequence[dict[str, Any]], prompt: PromptSpec, lm: Any, *, generation: bool
) -> tuple[Renderer, str, list[Place]]:
    """Return a conversation, rendered in a form, and the places of its parts."""
    renderer = Renderer(messages, form, tokenizer=lm.tokenizer, options=prompt.chat_options, generation=generation)
    text = renderer.render()
    return renderer, text, places(renderer, text)


def _learned(renderer: Renderer, text: str, parts: Sequence[Place], lm: Any) -> tuple[list[Range], set[int]]:
    """Return what is learned around the texts of the assistant's turns, and the turns that no control word ends.

    A turn is learned from where the prompt ends that it answers, to the first control word behind it.
    """
    ranges, without_end = [], set()
    for turn, message in enumerate(renderer.messages):
        indices = [index for index, place in enumerate(parts) if place.turn == turn]
        texts = [parts[index] for index in indices if parts[index].image is None]
        if message["role"] != "assistant" or not texts:
            continue
        ranges.append((_start(renderer, turn, text, texts[0].start), texts[0].start))
        last, following = parts[indices[-1]], parts[indices[-1] + 1 : indices[-1] + 2]
        until = following[0].start if following else len(text)
        control = lm.text.whole_text.find_control(text, last.end, until)
        if control is None:
            without_end.add(turn)
        else:
            ranges.append((last.end, control.end()))
    return ranges, without_end


def _start(renderer: Renderer, turn: int, text: str, content: int) -> int:
    """Return where the prompt for a turn ends, if the conversation begins with it; otherwise where its text starts."""
    try:
        prompt = renderer.render(asked=turn)
    except Unfit:
        return content
    return len(prompt) if len(prompt) <= content and text.startswith(prompt) else content


def _pieces(text: str, parts: Sequence[Place], learned: Sequence[Range], without_end: set[int]) -> list[Piece]:
    """Return a rendered conversation as pieces; the assistant's texts are targets."""
    pieces: list[Piece] = [Template("")]
    starts = {place.start: place for place in parts}
    last_texts = {place.turn: place for place in parts if place.image is None}
    borders = {0, len(text), *itertools.chain(*learned), *itertools.chain(*(place[:2] for place in parts))}
    for start, end in itertools.pairwise(sorted(borders)):
        place = starts.get(start)
        if place is None:
            pieces.append(Template(text[start:end], learned=(start, end) in learned))
        elif place.image is not None:
            pieces.append(place.image)
        elif place.role == "assistant":
            ends = place.turn in without_end and last_texts[place.turn] is place
            pieces.append(Target(text[start:end], ends=ends))
        elif place.role == "system":
            pieces.append(Given(text[start:end]))
        else:
            pieces.append(text[start:end])
    return pieces
