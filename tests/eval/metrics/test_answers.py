"""ANLS, relaxed accuracy, POPE and rankings: by hand, and compared with scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, f1_score, label_ranking_average_precision_score, ndcg_score

import mllm
from mllm.errors import MLLMError


@pytest.mark.parametrize(
    ("prediction", "answers", "value"),
    [
        ("Brownish", ["brown"], 1 - 3 / 8),
        ("red", ["blue", "RED "], 1.0),
        ("cat", ["dog"], 0.0),
        ("ab", ["ac"], 0.5),  # the threshold itself counts
        ("abc", ["axy"], 0.0),
        ("", ["a"], 0.0),
    ],
)
def test_anls_is_the_share_of_letters_that_stay(prediction, answers, value):
    assert mllm.metric("vqa/anls")([prediction], [answers]).value == pytest.approx(value)


@pytest.mark.parametrize(
    ("prediction", "answer", "right"),
    [
        ("105", "100", True),
        ("105.1", "100", False),
        ("-95", "-100", True),
        ("12%", "0.12", True),
        ("1,050", "1000", False),
        ("0.01", "0", False),
        ("0", "0", True),
        ("Germany", "germany", True),
        ("2012", "in 2012", False),
    ],
)
def test_relaxed_accuracy_allows_numbers_five_percent(prediction, answer, right):
    assert mllm.metric("vqa/relaxed")([prediction], [[answer]]).value == float(right)


def test_pope_is_what_scikit_learn_says():
    draw = np.random.default_rng(0)
    predicted, true = draw.integers(0, 2, 500), draw.integers(0, 2, 500)
    words = np.array([["No.", "There is not one", "no, it isn't"], ["Yes", "yes. No doubt.", "I see a dog"]])
    predictions = [str(words[value, draw.integers(3)]) for value in predicted]
    references = [["yes" if value else "no"] for value in true]
    assert mllm.metric("pope/f1")(predictions, references).value == pytest.approx(f1_score(true, predicted))
    assert mllm.metric("pope/accuracy")(predictions, references).value == pytest.approx((predicted == true).mean())
    assert mllm.metric("pope/yes-rate")(predictions, references).value == pytest.approx(predicted.mean())
    assert mllm.metric("pope/f1")(["no"], [["no"]]).value == 0.0
    with pytest.raises(MLLMError, match=r"item 1 is \['maybe'\]"):
        mllm.metric("pope/f1")(["no", "no"], [["no"], ["maybe"]])


def test_rankings_are_what_scikit_learn_says():
    draw = np.random.default_rng(1)
    scores, right = draw.normal(size=(40, 30)), draw.random((40, 30)) < 0.1
    right[:, 0] = True
    predictions = [" ".join(map(str, np.argsort(-row))) for row in scores]
    references = [[str(i) for i in np.flatnonzero(row)] for row in right]
    ours = {name: mllm.metric(f"retrieval/{name}")(predictions, references) for name in ("map", "ndcg", "mrr", "r@5")}
    assert ours["map"].per_item == pytest.approx(
        [average_precision_score(*item) for item in zip(right, scores, strict=True)]
    )
    assert ours["ndcg"].value == pytest.approx(ndcg_score(right, scores))
    assert ours["r@5"].value == np.mean([row[np.argsort(-s)[:5]].any() for row, s in zip(right, scores, strict=True)])
    one = [refs[:1] for refs in references]  # with one right id the average precision is its reciprocal rank
    alone = np.zeros_like(right)
    alone[:, 0] = True
    assert mllm.metric("retrieval/mrr")(predictions, one).value == pytest.approx(
        label_ranking_average_precision_score(alone, scores)
    )
    assert mllm.metric("retrieval/map")(["b"], [["a", "b"]]).value == 0.5  # a missed id counts
    assert mllm.metric("retrieval/mrr")(["b", "b a"], [["a"], ["a"]]).per_item == [0.0, 0.5]  # one is missed
    with pytest.raises(MLLMError, match="has an id twice"):
        mllm.metric("retrieval/mrr")(["a b a"], [["a"]])


def test_visdials_gain_is_graded_and_cut_at_the_number_that_is_right():
    relevance = np.array([[0.0, 1.0, 0.2, 0.6, 0.0], [0.4, 0.0, 0.0, 0.0, 0.0]])
    scores = np.array([[0.1, 0.5, 0.9, 0.2, 0.3], [0.2, 0.9, 0.1, 0.0, 0.3]])
    references = [[str(i) for i, share in enumerate(row) for _ in range(round(20 * share))] for row in relevance]
    rankings = [" ".join(map(str, np.argsort(-row))) for row in scores]
    expected = [ndcg_score([r], [s], k=int((r > 0).sum())) for r, s in zip(relevance, scores, strict=True)]
    assert mllm.metric("retrieval/ndcg-relevant")(rankings, references).per_item == pytest.approx(expected)
