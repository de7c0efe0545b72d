"""METEOR and SPICE of captions, by the Java programs that come with ``pycocoevalcap``.

Both see the captions as the COCO evaluation gives them: PTB-tokenised. METEOR 1.5 (Denkowski and Lavie 2014) takes its
corpus value from matches summed over the corpus; SPICE (Anderson et al. 2016, https://arxiv.org/abs/1607.08822) is the
mean of the items'. SPICE also needs Stanford CoreNLP, which `pycocoevalcap` downloads when it is used first.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mllm.eval.metrics.checks import check
from mllm.eval.metrics.ngrams import words

from mllm.errors import MLLMError
from mllm.evaluation import Score

VERSION = "pycocoevalcap-1"


def meteor(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Score:
    """Return METEOR 1.5.

    Raises:
        MLLMError: there is no Java, or no `pycocoevalcap`.
    """
    value, per_item = _asked("meteor", "Meteor", predictions, references)
    return Score(float(value), [float(score) for score in per_item], "caption/meteor", VERSION)


def spice(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Score:
    """Return the mean of SPICE's F-scores.

    Raises:
        MLLMError: there is no Java, no `pycocoevalcap`, or none of the models it works with.
    """
    place = _package() / "spice" / "lib"
    if not list(place.glob("stanford-corenlp-*-models.jar")):
        raise MLLMError(
            f"SPICE is absent: Stanford CoreNLP's jars are not in {place}. Where there is a network, "
            "`get_stanford_models` of pycocoevalcap.spice.get_stanford_models puts them there."
        )
    value, per_item = _asked("spice", "Spice", predictions, references)
    return Score(float(value), [float(score["All"]["f"]) for score in per_item], "caption/spice", VERSION)


def _package() -> Path:
    found = find_spec("pycocoevalcap")
    if found is None or not found.submodule_search_locations:
        raise MLLMError("METEOR and SPICE are absent: pip install pycocoevalcap.")
    if shutil.which("java") is None:
        raise MLLMError("METEOR and SPICE are absent: they are Java programs, and there is no `java` here.")
    return Path(next(iter(found.submodule_search_locations)))


def _asked(
    module: str, name: str, predictions: Sequence[str], references: Sequence[Sequence[str]]
) -> tuple[Any, Sequence[Any]]:
    check(predictions, references)
    _package()
    scorer = getattr(import_module(f"pycocoevalcap.{module}.{module}"), name)()
    said = {item: [" ".join(words(text))] for item, text in enumerate(predictions)}
    true = {item: [" ".join(words(text)) for text in texts] for item, texts in enumerate(references)}
    found: tuple[Any, Sequence[Any]] = scorer.compute_score(true, said)
    if process := getattr(scorer, "meteor_p", None):  # it would be ended with its pipes left open
        process.communicate()
    return found
