"""Show training examples as they are tokenized, with what is learned marked."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mllm.config import loading
from mllm.config.recipe import Stage
from mllm.data.epochs import steps_of
from mllm.data.sources import read_all
from mllm.data.stream import Stream, Unreadable
from mllm.model import Model
from mllm.planning.needs import planned_needs
from mllm.planning.paper import meta_model
from mllm.prompts.batch import IGNORED, Encoded
from mllm.prompts.pieces import Piece

START, END = "«", "»"  # around learned tokens
BETWEEN = "│"  # tokens


def first_examples(
    recipe: str, overrides: Mapping[str, Any] | Sequence[str] = (), count: int = 1
) -> list[tuple[str, list[str]]]:
    """Return the first training examples of every stage that trains text, as text; of equal ones the first stage's.

    Args:
        recipe: a name or a path.
        overrides: dotted.
        count: examples of a stage.

    Raises:
        MLLMError: the recipe does not fit, or its data cannot be read.
    """
    config = loading.load(recipe, overrides)
    with planned_needs(config):
        return _of_stages(config.stages, count)


def epochs(recipe: str, overrides: Mapping[str, Any] | Sequence[str] = ()) -> list[str]:
    """Return a line for each stage with ``epochs``: their steps.

    Raises:
        MLLMError: the recipe does not fit, or its data cannot be read.
    """
    lines = []
    for stage in loading.load(recipe, overrides).stages:
        if stage.epochs is not None:
            sources = read_all(stage.data.train, seed=stage.seed, skip=stage.data.skip)
            number, steps = sum(len(source.items) for source in sources), steps_of(stage, sources)
            lines.append(f"{stage.name}: {stage.epochs:g} epochs of {number:,} examples are {steps:,} steps.")
    return lines


def _of_stages(stages: Sequence[Stage], count: int) -> list[tuple[str, list[str]]]:
    shown: list[tuple[str, list[str]]] = []
    for stage in stages:
        if not stage.train or not stage.data.train or stage.lm is None:
            continue
        model = meta_model(stage)
        if model.generates_text and model.lm.tokenizer is not None:
            examples = [_shown(pieces, model) for pieces in _examples(stage, model, count)]
            if examples not in [others for _, others in shown]:
                shown.append((stage.name, examples))
    return shown


def _examples(stage: Stage, model: Model, count: int) -> list[list[Piece]]:
    stream = Stream(
        read_all(stage.data.train, seed=stage.seed),
        stage.prompt,
        seed=stage.seed,
        lm=model.lm,
        num_visual=model.counts,
        data=stage.data,
    )
    return stream.take(count)


def _shown(pieces: Sequence[Piece], model: Model) -> str:
    """Return an example as text; one that cannot be read, as the reason."""
    if pieces and isinstance(pieces[0], Unreadable):
        return f"left out: {pieces[0].reason}"
    encoded = model.encode(pieces)
    learned = sum(label != IGNORED for label in encoded.labels)
    return f"{len(encoded.ids)} tokens, {learned} learned: {as_text(encoded, model.lm)}"


def as_text(encoded: Encoded, lm: Any) -> str:
    """Return an encoded prompt as text: its tokens, those that are learned between « and ».

    A learned token that is not in the sequence, such as the end of a turn that the next turn follows directly, stands
    where it is learned.
    """
    groups = itertools.groupby(_tokens(encoded, lm), lambda token: token[1])
    runs = [(BETWEEN.join(text for text, _ in tokens), learned) for learned, tokens in groups]
    return BETWEEN.join(f"{START}{text}{END}" if learned else text for text, learned in runs)


def _tokens(encoded: Encoded, lm: Any) -> Iterator[tuple[str, bool]]:
    """Yield each token's text, and whether it is learned; visual tokens next to each other are one."""
    names = {token: name for name, token in lm.new_tokens.items()}

    def written(token: int) -> str:
        text = names.get(token) or str(lm.tokenizer.decode([token]))
        return text.replace("\n", "\\n").replace("\r", "\\r").replace("\t", "\\t")

    positions = zip(encoded.ids, encoded.visual, encoded.labels, strict=True)
    for is_visual, run in itertools.groupby(positions, lambda position: position[1]):
        members = list(run)
        for token, _, label in members[:1] if is_visual else members:
            if label not in (IGNORED, token) or (is_visual and label != IGNORED):
                yield written(label), True
            text = f"<{len(members)} visual tokens>" if is_visual else written(token)
            yield text, not is_visual and label == token
