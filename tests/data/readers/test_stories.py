"""Test stories and dialogues in their authors' files: queries, candidates and the suites that use them."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

import mllm
from mllm.data.items import Item
from mllm.errors import MLLMError
from mllm.registry import lookup
from mllm.testing import tiny_image

HEAD: dict[str, Any] = {"heads": [{"type": "retrieval", "dim": 6}], "tokens": ["[RET]"]}


@pytest.fixture
def vist(tmp_path):
    """Return a folder with two complete stories of three images, and one with a missing image."""
    (tmp_path / "sis").mkdir()
    (tmp_path / "images").mkdir()
    rows = []
    for story, photos in (("7", "abc"), ("8", "cde"), ("9", "abx")):
        for order in (2, 0, 1):  # as they come
            text = f"{story} {order}."
            row = {"story_id": story, "photo_flickr_id": photos[order], "worker_arranged_photo_order": order}
            rows.append([row | {"text": text, "original_text": "Not this"}])
    content = {"images": [{"id": photo} for photo in "abcdex"], "annotations": rows}
    (tmp_path / "sis/val.story-in-sequence.json").write_text(json.dumps(content))
    for number, photo in enumerate("abcde"):
        tiny_image(number).save(tmp_path / "images" / f"{photo}.{'png' if photo == 'b' else 'jpg'}")
    return tmp_path


def names(pieces: Any) -> list[str]:
    return [piece if isinstance(piece, str) else piece.path.stem for piece in pieces]


def test_the_last_image_of_a_story_is_retrieved(vist):
    module = import_module("mllm.eval.suite")
    items = module.read_items(module.load_suite("vist"), vist)
    assert [item.id for item in items] == [f"{s}/{much}" for much in ("caption", "captions", "story") for s in "78"]
    assert [item.kind for item in items[::2]] == ["1 caption", "all captions", "all captions and images"]
    assert all(names(item.images) == [*"abcde"] for item in items)
    assert [item.answers for item in items[:2]] == [("2",), ("4",)]
    assert [names(item.document) for item in items[::2]] == [
        ["7 2."],
        ["7 0. 7 1. 7 2."],
        ["7 0.", "a", "7 1.", "b", "7 2."],
    ]
    with pytest.raises(MLLMError, match="all images of none of the 3 stories"):
        lookup("readers", "vist")(annotations=str(vist / "sis/val.story-in-sequence.json"), images=str(vist / "sis"))
    with pytest.raises(MLLMError, match=r"vist.* has told=\['all'\]"):
        module.read_items(module.load_suite("vist", ["data.told=[all]"]), vist)


def test_the_suite_excludes_images_of_the_query(vist, tiny_model, tmp_path):
    report = mllm.evaluate(tiny_model(**HEAD), "vist", vist, out=tmp_path / "out")
    assert report.summary["baselines"] == ["shuffled", "blind"] and len(report.summary["kinds"]) == 3
    assert [len(row["prediction"].split()) for row in report.rows] == [5, 5, 5, 5, 3, 3]
    assert not set(report.rows[4]["prediction"].split()) & {"0", "1"}  # a and b stand in the story
    assert report.rows[4]["question"] == "7 0.7 1.7 2."


@pytest.fixture
def visdial(tmp_path):
    """Return a folder with two dialogues of two rounds and three options per question."""
    questions, answers = ["is it red", "how many", "where"], ["yes", "no", "2", "in a park"]
    dialogs: list[dict[str, Any]] = [
        {
            "image_id": 7 + number,
            "caption": "unused",
            "dialog": [
                {"question": number, "answer": 0, "answer_options": [1, 0, 2], "gt_index": 1},
                {"question": 2, "answer": 3, "answer_options": [3, 1, 0], "gt_index": 0},
            ],
        }
        for number in range(2)
    ]
    content = {"data": {"questions": questions, "answers": answers, "dialogs": dialogs}}
    (tmp_path / "visdial_1.0_val.json").write_text(json.dumps({"split": "val2018", "version": "1.0"} | content))
    dense = [{"image_id": 7, "round_id": 2, "gt_relevance": [1.0, 0.0, 0.2]}]
    (tmp_path / "visdial_1.0_val_dense_annotations.json").write_text(json.dumps(dense))
    (tmp_path / "VisualDialog_val2018").mkdir()
    for number in range(2):
        tiny_image(number).save(tmp_path / f"VisualDialog_val2018/VisualDialog_val2018_{7 + number:012d}.jpg")
    return tmp_path


def items_of(suite: str, folder: Path, *overrides: str) -> list[Item]:
    module = import_module("mllm.eval.suite")
    items: list[Item] = module.read_items(module.load_suite(suite, overrides), folder)
    return items


def test_the_image_of_a_dialogue_is_retrieved(visdial):
    items = items_of("visdial", visdial, "data.rounds=[1,2]")
    assert [(item.id, item.kind, item.answers) for item in items] == [
        ("7/1", "1 round", ("0",)),
        ("8/1", "1 round", ("1",)),
        ("7/2", "2 rounds", ("0",)),
        ("8/2", "2 rounds", ("1",)),
    ]
    assert items[0].document == ("Q: is it red? A: yes.",)
    assert items[3].document == ("Q: how many? A: yes. Q: where? A: in a park.",)


def test_answers_are_ranked_by_likelihood(visdial, tiny_model):
    items = items_of("visdial-answers", visdial)
    assert [item.id for item in items] == ["7/1", "7/2", "8/1", "8/2"]
    assert (items[1].question, items[1].choices) == (
        "Q: is it red?\nA: yes\nQ: where?",
        ("in a park", "no", "yes"),
    )
    assert [item.answers for item in items] == [("1",), ("0",)] * 2
    model = tiny_model()
    report = mllm.evaluate(model, "visdial-answers", visdial)
    assert report.summary["baselines"] == ["blind", "shuffled"]
    prompt = [items[1].images[0], model.spec.prompt.question.format(question=items[1].question)]
    scores = model.score(prompt, items[1].choices)
    assert report.rows[1]["prediction"].split() == [str(index) for index in sorted(range(3), key=lambda i: -scores[i])]


def test_relevance_is_the_number_of_repetitions(visdial, tiny_model):
    (item,) = items_of("visdial-relevant", visdial)
    assert item.id == "7/2" and item.answers == ("0",) * 20 + ("2",) * 4
    assert mllm.evaluate(tiny_model(), "visdial-relevant", visdial).summary["n"] == 1
    with pytest.raises(MLLMError, match="Set dense"):
        items_of("visdial-answers", visdial, "data.find=relevant")
    (visdial / "visdial_1.0_val_dense_annotations.json").write_text("[{}]")
    with pytest.raises(MLLMError, match=r"dense_annotations\.json, row 1 has an unexpected form"):
        items_of("visdial-relevant", visdial)
