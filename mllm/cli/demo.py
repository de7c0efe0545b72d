"""Show what a trained model sees: `python -m mllm.cli.demo RUN` lets it describe four scenes that no recipe trains on.

The scenes are the first ones of their kinds by a fixed seed, whatever a model says about them: two of single objects,
one of several kinds, and one of several objects of one kind. Answers are printed, and written to ``RUN/demo.html``.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from html import escape
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple, cast

from mllm.answering.generate import answer_each
from mllm.build import load
from mllm.data.emoji.image import Scene
from mllm.data.emoji.scenes import emoji_scenes
from mllm.data.emoji.text import groups
from mllm.data.items import Item
from mllm.errors import MLLMError
from mllm.readout.words import readable

SEED = 2  # the suites use seed 1
SIZE = 200  # items that are searched for the scenes
SHOWN = {"one object": 2, "several kinds": 1, "several of a kind": 1}  # how many scenes of what
PAGE = """<!doctype html><meta charset="utf-8"><title>{run}</title>
<style>
body {{font: 16px sans-serif; max-width: 48em; margin: 2em auto}}
td {{padding: .5em 1em; vertical-align: top}}
</style>
<h1>What {run} sees</h1>
<p>Scenes that it was not trained on. The words are those that the language model reads in the image's place.</p>
<table>{rows}</table>
"""
ROW = """<tr><td><img src="{file}" width="180"></td><td>
<b>{caption}</b><br>right: {right}<br><small>words: {words}</small>
<p>{question}<br><b>{answer}</b><br>right: {right_answer}</p>
</td></tr>
"""


class Shown(NamedTuple):
    """A scene: an item with its captions, and one with a question about it."""

    caption: Item
    question: Item


def scenes() -> list[Shown]:
    """Return the demo's scenes; the same ones every time.

    Raises:
        MLLMError: the part mllm/openmoji is not installed.
    """
    shown: list[Shown] = []
    for name, count in SHOWN.items():
        shown += [one for one in _all() if _kind(one) == name][:count]
    return shown


def write_images(folder: Path) -> list[Path]:
    """Write the images as ``1.png``, ``2.png``, ... and return their paths.

    Raises:
        MLLMError: the part mllm/openmoji is not installed, or the folder cannot be written.
    """
    shown = scenes()
    paths = [folder / f"{number}.png" for number in range(1, len(shown) + 1)]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for one, path in zip(shown, paths, strict=True):
            one.caption.images[0].open().save(path)
    except OSError as error:
        raise MLLMError(
            f"The images in {folder} cannot be written: {error.strerror or error}. Give another folder."
        ) from None
    return paths


def show(run: Path) -> Path:
    """Print and write what a run's model says about the scenes; return the path of the page.

    Raises:
        MLLMError: there is no model in the folder, or an error of `write_images`.
    """
    paths, model, page = write_images(run / "pictures"), load(run), run / "demo.html"
    rows = [_answers(model, path, one) for path, one in zip(paths, scenes(), strict=True)]
    for row in rows:
        print("{path}: {caption}\n  right: {right}\n  words: {words}".format(**row))
        print("  {question} {answer} (right: {right_answer})".format(**row))
    html = [ROW.format(**{key: escape(value) for key, value in row.items()}) for row in rows]
    page.write_text(PAGE.format(run=escape(run.name), rows="".join(html)), encoding="utf-8")
    return page


def _answers(model: Any, path: Path, shown: Shown) -> dict[str, str]:
    """Return what a model says about one image, and what is right."""
    prompt, question = model.spec.prompt, str(shown.question.question)
    texts = (prompt.caption, prompt.question.format(question=question))
    caption, answer = (str(next(iter(answer_each(model, [path], text)))).strip() for text in texts)
    return {
        "path": str(path),
        "file": f"{path.parent.name}/{path.name}",
        "caption": caption,
        "right": shown.caption.answers[0],
        "words": readable(model.words([path])[0]),
        "question": question,
        "answer": answer,
        "right_answer": shown.question.answers[0],
    }


def _all() -> Iterator[Shown]:
    """Yield scenes that have a question."""
    items = emoji_scenes(split="val", task="both", size=SIZE, seed=SEED)
    for _, same in groupby(items, key=lambda item: item.images[0]):
        caption, *questions = same
        if questions:
            yield Shown(caption, questions[0])


def _kind(shown: Shown) -> str:
    scene = cast(Scene, shown.caption.images[0])
    if len(scene.things) == 1:
        return "one object"
    return "several of a kind" if len(groups(scene)) == 1 else "several kinds"


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m mllm.cli.demo RUN")
    try:
        print(f"\nPage:         {show(Path(sys.argv[1]))}")
    except MLLMError as error:
        sys.exit(f"mllm: {error}")
