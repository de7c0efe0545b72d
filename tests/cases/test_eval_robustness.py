"""Evaluations of data as people bring it: one bad item among good ones, odd predictions, and other orders."""

from __future__ import annotations

import contextlib
import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

import mllm
from mllm.errors import MLLMError
from mllm.testing import tiny_image

GOOD = [{"image": f"{index}.png", "question": f"q{index}?", "answer": "x"} for index in range(5)]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for index in range(6):
        tiny_image(index).save(folder / f"{index}.png")
    (folder / "broken.png").write_bytes(b"\x89PNG broken")
    return folder


@pytest.fixture
def predictions(data: Path, tmp_path: Path, model_of: Callable[..., Any]) -> Callable[..., list[dict[str, Any]]]:
    """Return a function that evaluates a model on rows of a table, and returns the predictions."""

    def evaluated(rows: Sequence[dict[str, Any]], family: str = "bytes", **settings: Any) -> list[dict[str, Any]]:
        (data / "rows.json").write_text(json.dumps(rows))
        suite = {
            "name": "rows",
            "about": "A table.",
            "data": {"format": "table"},
            "folder": {"path": "rows.json"},
            "metrics": ["vqa/exact-match"],
            "decoding": {"max_new_tokens": 4},
            "batch_size": 4,
            **settings,
        }
        (tmp_path / "suite.yaml").write_text(yaml.safe_dump(suite))
        mllm.evaluate(model_of(family), str(tmp_path / "suite.yaml"), data, baselines=[], out=tmp_path / "out")
        return [json.loads(line) for line in (tmp_path / "out/predictions.jsonl").read_text().splitlines()]

    return evaluated


def test_every_item_is_predicted(predictions):
    assert len(predictions(GOOD)) == len(GOOD)


def test_one_broken_image_is_named_or_left_out(predictions):
    try:
        scored = predictions([*GOOD, {"image": "broken.png", "question": "q", "answer": "x"}])
    except MLLMError as error:
        assert "broken.png" in str(error)
    else:
        assert len(scored) >= len(GOOD)


@pytest.mark.parametrize("family", ["bytes", "gpt2"])
@pytest.mark.parametrize(("question", "limit"), [("long " * 80, 4), ("x", 2000)], ids=["prompt", "answer"])
def test_an_item_past_the_context_is_skipped_and_counted(predictions, tmp_path, family, question, limit):
    rows = [*GOOD[:2], {"image": "5.png", "question": question, "answer": "x"}, *GOOD[2:]]
    if limit > 4:
        with pytest.raises(MLLMError, match=r"No item of the suite rows fits.*0.png"):
            predictions(rows, family, decoding={"max_new_tokens": limit})
        return
    scored = predictions(rows, family)
    assert [row["question"] for row in scored] == [row["question"] for row in GOOD]
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    ((item, error),) = summary["skipped"]["items"].items()
    assert (summary["n"], summary["skipped"]["n"]) == (5, 1)
    assert "5.png" in item
    assert "context is 256 tokens" in error
    assert error in json.dumps(
        json.loads(
            (tmp_path / "out/report.html").read_text().split('type="application/json">')[1].split("</script>")[0]
        ),
        ensure_ascii=False,
    )


def test_an_item_with_a_choice_past_the_context_is_skipped_and_counted(predictions, data, tmp_path):
    (data / "captions").mkdir()
    pairs = {str(i): {"filename": f"{i}.png", "caption": "x", "negative_caption": "y"} for i in range(4)}
    pairs["2"]["negative_caption"] = "y" * 300
    (data / "captions" / "swap.json").write_text(json.dumps(pairs))
    folder = {"annotations": "captions", "images": "."}
    scored = predictions([], data={"format": "sugarcrepe"}, folder=folder, answer="choose")
    assert [row["id"] for row in scored] == ["swap/0", "swap/1", "swap/3"]
    skipped = json.loads((tmp_path / "out/summary.json").read_text())["skipped"]
    assert (skipped["n"], list(skipped["items"])) == (1, ["swap/2"])


def test_predictions_stand_under_their_own_ids(predictions, model_of, data):
    rows = [{"image": f"{i}.png", "question": f"{'q' * (40 - 7 * i)}?", "answer": "x"} for i in range(5)]
    alone = {
        row["question"]: model_of().see([data / row["image"]]).ask(row["question"], max_new_tokens=4) for row in rows
    }
    batched = predictions(rows)
    assert {row["id"].split("#", 1)[1]: row["prediction"] for row in batched} == alone


def test_an_item_without_a_reference_is_refused(predictions):
    with pytest.raises(MLLMError):
        predictions([{"image": "0.png", "question": "q?", "answer": ["", ""]}])


# Metrics.

ANSWERS = ["a dog is running", "two cats on mat", "a street", "empty room"]
REFERENCES = [
    ["a dog runs", "the dog is running"],
    ["two cats", "cats on a mat"],
    ["a red car in the street", "car"],
    ["nothing here", "empty"],
]


@pytest.mark.parametrize("name", ["caption/cider-d", "caption/bleu-4", "caption/rouge-l", "vqa/official", "vqa/anls"])
def test_the_value_of_an_item_does_not_depend_on_the_order(name):
    order = [2, 0, 3, 1]
    metric = mllm.metric(name)
    values = metric(ANSWERS, REFERENCES).per_item
    reordered = metric([ANSWERS[i] for i in order], [REFERENCES[i] for i in order]).per_item
    assert reordered == pytest.approx([values[i] for i in order], abs=1e-12)


NGRAMS, SIGMA = 4, 6.0
Vector = list[dict[tuple[str, ...], float]]


def ngrams(text: str) -> Counter[tuple[str, ...]]:
    tokens = text.split()  # the texts here have neither capitals nor punctuation
    return Counter(tuple(tokens[i : i + n]) for n in range(1, NGRAMS + 1) for i in range(len(tokens) - n + 1))


def cider_d(answers: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """Return CIDEr-D (arXiv:1411.5726, section 6) of each answer, by the formula."""
    frequency = Counter(gram for texts in references for gram in {gram for text in texts for gram in ngrams(text)})

    def vector(text: str) -> Vector:
        weights: Vector = [{} for _ in range(NGRAMS)]
        for gram, count in ngrams(text).items():
            weights[len(gram) - 1][gram] = count * math.log(len(references) / max(1, frequency[gram]))
        return weights

    def similarity(answer: str, reference: str) -> float:
        lengths = [sum(count for gram, count in ngrams(text).items() if len(gram) == 2) for text in (answer, reference)]
        penalty = math.exp(-((lengths[0] - lengths[1]) ** 2) / (2 * SIGMA**2))
        total = 0.0
        for ours, theirs in zip(vector(answer), vector(reference), strict=True):
            norm = math.hypot(*ours.values()) * math.hypot(*theirs.values())
            clipped = sum(min(weight, theirs.get(gram, 0.0)) * theirs.get(gram, 0.0) for gram, weight in ours.items())
            total += clipped / norm * penalty if norm else 0.0
        return total / NGRAMS

    return [
        10 * sum(similarity(answer, text) for text in texts) / len(texts)
        for answer, texts in zip(answers, references, strict=True)
    ]


def test_cider_d_is_that_of_the_formula():
    assert mllm.metric("caption/cider-d")(ANSWERS, REFERENCES).per_item == pytest.approx(
        cider_d(ANSWERS, REFERENCES), abs=1e-9
    )


@pytest.mark.parametrize(
    "name",
    [
        *(f"caption/{metric}" for metric in ("cider-d", "bleu-4", "rouge-l")),
        *(f"vqa/{metric}" for metric in ("official", "textvqa", "anls", "exact-match", "relaxed")),
    ],
)
@pytest.mark.parametrize(
    "answer",
    ["", " ", "。", "你好 世界", "a\u00a0b", "🐈", "x" * 5000, "a\nb", "!!!", "the"],
    ids=["empty", "blank", "full-stop", "chinese", "no-break", "emoji", "long", "newline", "marks", "article"],
)
def test_an_odd_answer_is_scored_or_refused(name, answer):
    with contextlib.suppress(MLLMError):
        values = mllm.metric(name)([answer, "a cat"], [["一只猫", "a cat"], ["a cat"]]).per_item
        assert len(values) == 2
        assert all(map(math.isfinite, values))


@pytest.mark.parametrize("answer", ["inf", "nan", "1e309", "-5", "5%"])
def test_an_answer_that_is_another_number_is_wrong(answer):
    assert mllm.metric("vqa/relaxed")([answer], [["5"]]).value == 0


@pytest.mark.parametrize("reference", ["nan", "inf"])
def test_a_text_is_not_the_number_of_a_reference(reference):
    assert mllm.metric("vqa/relaxed")(["x"], [[reference]]).value == 0
