"""Define what an answer mode is, and what an evaluation hands to it.

An answer mode says how the items of a suite are answered: by generated text, by the most likely choice, by a ranking.
A suite names its mode (``answer: rank``). A new mode is one class and one line of the registry group ``answers``;
another package adds one by an entry point of the group ``mllm.answers``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from mllm.eval.journal import Journal
from mllm.eval.scoring import Helpers
from mllm.eval.suite import Suite

from mllm.assembly import Assembly
from mllm.data.items import Item
from mllm.media.images import ImageSource


@dataclass(frozen=True)
class Context:
    """One evaluation, as its answer mode needs it.

    Attributes:
        suite: the settings: ``batch_size``, ``decoding``, ``calibrate``, ...
        baselines: the names of the baselines to evaluate, of those that the mode offers.
        training: what the model was trained on, for the baseline ``nearest``.
        folder: where the report is written, for modes that write files of their own; None: nowhere.
        journal: the answers of an interrupted evaluation, read before a batch is computed and written after it.
        helpers: the suite's or the model's scorer, and the suite's judge, loaded when first used.
    """

    suite: Suite
    baselines: Sequence[str] = ()
    training: Sequence[Item] = ()
    folder: Path | None = None
    journal: Journal = field(default_factory=lambda: Journal(None, {}))
    helpers: Helpers = field(default_factory=Helpers)


class AnswerMode(Protocol):
    """A way to answer a suite's items (registry group ``answers``); its class takes no arguments.

    An answer is a text, which the suite's metrics compare with the item's ``answers``: a generated text, the chosen
    text, indices of a ranking separated by spaces, the path of a generated image, a label.
    """

    def baselines(self, items: Sequence[Item]) -> dict[str, bool]:
        """Return the baselines that these N items can be answered by, and which of them are evaluated by default.

        Nothing is computed. No baselines (``{}``): the mode has nothing to compare the model with.
        """

    def answers(self, model: Assembly, items: Sequence[Item], context: Context) -> dict[str, list[str]]:
        """Return the N answers of each condition, in the order of the items.

        The conditions are ``model``, which comes first, and each of ``context.baselines``.

        Args:
            model: the model that is evaluated, in evaluation mode.
            items: N items; their ``answers`` are the references.
            context: the suite's settings, the baselines, and where to write.

        Raises:
            MLLMError: the items or the model do not fit this mode; the message names the item or the missing part.
        """

    def shown_images(self, item: Item, answer: str) -> tuple[ImageSource, ...]:
        """Return the images that the report shows with an item and its answer."""
