"""VQA accuracy against values of the official program, and by hand."""

import json
from pathlib import Path
from typing import Any

import pytest

from mllm.errors import MLLMError
from mllm.registry import lookup

OFFICIAL = Path(__file__).parents[2] / "fixtures" / "vqa-official.jsonl"  # answers, and the official program's percents
NAMES = ["vqa/official", "vqa/normalise-both", "vqa/textvqa", "vqa/exact-match"]


TEXTVQA = OFFICIAL.with_name("vqa-textvqa.jsonl")  # answers scored with M4C's answer processor, as lmms-eval packs it


def value(name: str, prediction: str, references: list[str]) -> float:
    score: float = lookup("metrics", name)([prediction], [references]).value
    return score


def test_official_equals_the_official_program() -> None:
    cases = [json.loads(line) for line in OFFICIAL.read_text(encoding="utf-8").splitlines()]
    assert len(cases) == 300
    expected = [case["official_percent"] for case in cases]
    assert set(expected) == {0, 30, 60, 90, 100}
    score = lookup("metrics", "vqa/official")(
        [case["answer"] for case in cases], [case["annotations"] for case in cases]
    )
    assert [round(100 * accuracy, 2) for accuracy in score.per_item] == expected
    assert 100 * score.value == pytest.approx(sum(expected) / 300)


def test_textvqa_equals_its_program() -> None:
    cases = [json.loads(line) for line in TEXTVQA.read_text(encoding="utf-8").splitlines()]
    score = lookup("metrics", "vqa/textvqa")(
        [case["answer"] for case in cases], [case["annotations"] for case in cases]
    )
    assert score.per_item == pytest.approx([case["score"] for case in cases], abs=1e-6)
    others = lookup("metrics", "vqa/normalise-both")(
        [case["answer"] for case in cases], [case["annotations"] for case in cases]
    )
    assert score.per_item != pytest.approx(others.per_item)


@pytest.mark.parametrize(
    ("prediction", "references", "official", "both"),
    [
        ("yes", ["yes"] * 10, 1.0, 1.0),
        ("Yes.", ["yes"] * 10, 0.0, 1.0),  # unanimous: only that very string
        (" yes\n", ["yes"] * 10, 1.0, 1.0),
        ("Yes.", ["yes"] * 9 + ["no"], 1.0, 1.0),
        ("yes", ["yes"] + ["no"] * 9, 0.3, 0.3),  # (9 · 1/3 + 0) / 10
        ("yes", ["yes"] * 2 + ["no"] * 8, 0.6, 0.6),
        ("yes", ["yes"] * 3 + ["no"] * 7, 0.9, 0.9),
        ("0", ["none"] * 10, 0.0, 1.0),
        ("0", ["none"] * 9 + ["no"], 1.0, 1.0),
        ("the dont know", ["don't know"] * 5 + ["a dog"] * 5, 1.0, 1.0),
        ("left/right", ["left right"] * 5 + ["x"] * 5, 1.0, 1.0),  # between letters a sign becomes a space,
        ("left/ right", ["left right"] * 5 + ["x"] * 5, 1.0, 1.0),  # beside a space nothing
        ("1,000/5", ["10005"] * 5 + ["x"] * 5, 1.0, 1.0),  # with a comma in a number every sign goes
        ("u.s. 3.5", ["us 3.5"] * 5 + ["x"] * 5, 1.0, 1.0),
        ("x" + "." * 33, ["x" + "."] * 5 + ["y"] * 5, 0.0, 0.0),  # 32 full stops go on one side, 1 on the other
        ("x" + "." * 32, ["x" + "."] * 5 + ["y"] * 5, 1.0, 1.0),
        ("somebody'd", ["somebodyd"] * 5 + ["y"] * 5, 1.0, 1.0),
    ],
)
def test_accuracy_by_hand(prediction: str, references: list[str], official: float, both: float) -> None:
    assert value("vqa/official", prediction, references) == pytest.approx(official)
    assert value("vqa/normalise-both", prediction, references) == pytest.approx(both)


@pytest.mark.parametrize("name", NAMES)
def test_a_single_reference_scores_one_or_nothing(name: str) -> None:
    assert value(name, "red", ["red"]) == 1.0
    assert value(name, "blue", ["red"]) == 0.0


def test_exact_match_by_hand() -> None:
    assert value("vqa/exact-match", " Two Dogs. ", ["a cat", "two dogs"]) == 1.0
    assert value("vqa/exact-match", "the dog", ["dog"]) == 0.0
    assert value("vqa/exact-match", "dog..", ["dog"]) == 0.0


@pytest.mark.parametrize("name", NAMES)
def test_score_names_its_metric_and_keeps_the_order(name: str) -> None:
    score = lookup("metrics", name)(["red", "blue", "red"], [["red"], ["red"], ["red"]])
    assert (score.name, score.per_item, bool(score.version)) == (name, [1.0, 0.0, 1.0], True)
    assert score.value == pytest.approx(2 / 3)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("predictions", "references", "message"),
    [
        ([], [], "nothing to score"),
        (["a", "b"], [["a"]], "2 predictions for 1 lists of references"),
        (["a", "b"], [["a"], []], "Item 1 has no reference"),
        ([float("nan")], [["a"]], r"prediction of item 0 is nan \(float\): expected a string"),
    ],
)
def test_what_cannot_be_scored_is_named(name: str, predictions: Any, references: Any, message: str) -> None:
    with pytest.raises(MLLMError, match=message):
        lookup("metrics", name)(predictions, references)
