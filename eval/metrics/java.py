"""Compute METEOR and SPICE of captions by the Java programs that come with ``pycocoevalcap``.

Both get the captions as in the COCO evaluation: PTB-tokenised. METEOR 1.5 (Denkowski and Lavie 2014) takes its
corpus value from matches summed over the corpus; SPICE (Anderson et al. 2016, https://arxiv.org/abs/1607.08822) is the
mean over items. SPICE also needs Stanford CoreNLP, which `pycocoevalcap` downloads when it is used first.
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
    value, per_item = _scores("meteor", "Meteor", predictions, references)
    return Score(float(value), [float(score) for score in per_item], "caption/meteor", VERSION)


def spice(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Score:
    """Return the mean of SPICE's F-scores.

    Raises:
        MLLMError: there is no Java, no `pycocoevalcap`, or no model of Stanford CoreNLP.
    """
    folder = _package() / "spice" / "lib"
    if not list(folder.glob("stanford-corenlp-*-models.jar")):
        raise MLLMError(
            f"SPICE is absent: Stanford CoreNLP's jars are not in {folder}. With network access, "
            "`get_stanford_models` of pycocoevalcap.spice.get_stanford_models downloads them."
        )
    value, per_item = _scores("spice", "Spice", predictions, references)
    return Score(float(value), [float(score["All"]["f"]) for score in per_item], "caption/spice", VERSION)


def _package() -> Path:
    spec = find_spec("pycocoevalcap")
    if spec is None or not spec.submodule_search_locations:
        raise MLLMError("METEOR and SPICE are absent: pip install pycocoevalcap.")
    if shutil.which("java") is None:
        raise MLLMError("METEOR and SPICE are absent: they are Java programs, and `java` is not installed.")
    return Path(next(iter(spec.submodule_search_locations)))


def _scores(
    module: str, name: str, predictions: Sequence[str], references: Sequence[Sequence[str]]
) -> tuple[Any, Sequence[Any]]:
    check(predictions, references)
    _package()
    scorer = getattr(import_module(f"pycocoevalcap.{module}.{module}"), name)()
    predicted = {item: [" ".join(words(text))] for item, text in enumerate(predictions)}
    true = {item: [" ".join(words(text)) for text in texts] for item, texts in enumerate(references)}
    scores: tuple[Any, Sequence[Any]] = scorer.compute_score(true, predicted)
    if process := getattr(scorer, "meteor_p", None):  # it would be ended with open pipes
        process.communicate()
    return scores
