"""What a reader returns: one picture (or several) with captions, or with a question and its answers."""

from __future__ import annotations

from dataclasses import dataclass

from mllm.images import ImageSource


@dataclass(frozen=True)
class Item:
    """One item of a data set, before any prompt is put around it."""

    id: str
    images: tuple[ImageSource, ...]
    answers: tuple[str, ...]  # reference captions, or the annotators' answers (repetitions count)
    question: str | None = None  # None: a caption is wanted
    kind: str = ""  # what results are broken down by, e.g. "yes/no"
