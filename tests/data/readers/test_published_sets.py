"""Test every published data set: the files that its suite expects are read as items, and errors name the file."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

import mllm
from mllm.config.data import DataSpec
from mllm.data.items import Item
from mllm.data.sources import read_all
from mllm.errors import MLLMError
from mllm.testing import tiny_image


def write_files(folder: Path, files: dict[str, Any]) -> Path:
    """Write files: images by their suffix, JSON lines for a list in a ``.jsonl``, else JSON."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix in (".jpg", ".png"):
            tiny_image(content).save(path)
        elif path.suffix == ".jsonl" or name.startswith("pope/"):
            path.write_text("".join(json.dumps(row) + "\n" for row in content))
        else:
            path.write_text(json.dumps(content))
    return folder


def items_of(suite: str, folder: Path, *overrides: str) -> list[Item]:
    module = import_module("mllm.eval.suite")
    items: list[Item] = module.read_items(module.load_suite(suite, overrides), folder)
    return items


VQA_IMAGES = {f"val2014/COCO_val2014_{number:012d}.jpg": number for number in (7, 42)}
QUESTIONS = [
    {"question_id": 420, "image_id": 42, "question": "What is it?"},
    {"question_id": 70, "image_id": 7, "question": "How many?"},
]
ANNOTATIONS = [
    {"question_id": 70, "answer_type": "number", "answers": [{"answer": "2", "answer_id": i} for i in range(1, 11)]},
    {"question_id": 420, "answer_type": "other", "answers": [{"answer": "a cat", "answer_id": 1}]},
]
V2 = "v2_OpenEnded_mscoco_val2014_questions.json", "v2_mscoco_val2014_annotations.json"
OK = "OpenEnded_mscoco_val2014_questions.json", "mscoco_val2014_annotations.json"

# suite -> files, and for each item: id, image, question, answers, kind, choices
CASES: dict[str, tuple[dict[str, Any], list[tuple[Any, ...]]]] = {
    **{
        suite: (
            {questions: {"questions": QUESTIONS}, annotations: {"annotations": ANNOTATIONS}, **VQA_IMAGES},
            [
                ("420", "COCO_val2014_000000000042.jpg", "What is it?", ["a cat"], "other", []),
                ("70", "COCO_val2014_000000000007.jpg", "How many?", ["2"] * 10, "number", []),
            ],
        )
        for suite, (questions, annotations) in {"vqav2": V2, "ok-vqa": OK}.items()
    },
    "coco-karpathy": (
        {
            "dataset_coco.json": {
                "images": [
                    {"filepath": "val2014", "filename": "a.jpg", "cocoid": 5, "split": "test"}
                    | {"sentences": [{"raw": "A cat ."}, {"raw": "Cats"}]},
                    {"filename": "none.jpg", "split": "train", "sentences": []},
                ]
            },
            "val2014/a.jpg": 0,
        },
        [("5", "a.jpg", None, ["A cat .", "Cats"], "", [])],
    ),
    "flickr30k": (
        {
            "dataset_flickr30k.json": {
                "images": [{"filename": "9.jpg", "imgid": 3, "split": "test", "sentences": [{"raw": "A dog."}]}]
            },
            "flickr30k-images/9.jpg": 0,
        },
        [("3", "9.jpg", None, ["A dog."], "", [])],
    ),
    "nocaps": (
        {
            "nocaps_val_4500_captions.json": {
                "images": [{"id": 0, "file_name": "0013.jpg", "domain": "near-domain"}],
                "annotations": [{"image_id": 0, "caption": "a toy"}],
            },
            "val/0013.jpg": 0,
        },
        [("0", "0013.jpg", None, ["a toy"], "near-domain", [])],
    ),
    "vizwiz-captions": (
        {
            "annotations/val.json": {
                "images": [{"id": 1, "file_name": "v.jpg"}],
                "annotations": [
                    {"image_id": 1, "caption": "a can", "is_rejected": False, "is_precanned": False},
                    {"image_id": 1, "caption": "Quality issues", "is_rejected": False, "is_precanned": True},
                    {"image_id": 1, "caption": "spam", "is_rejected": True, "is_precanned": False},
                ],
            },
            "val/v.jpg": 0,
        },
        [("1", "v.jpg", None, ["a can"], "", [])],
    ),
    "textcaps": (
        {
            "TextCaps_0.1_val.json": {"data": [{"image_id": "ab", "caption_str": text} for text in ("one", "two")]},
            "train_images/ab.jpg": 0,
        },
        [("ab", "ab.jpg", None, ["one", "two"], "", [])],
    ),
    "a-okvqa": (
        {
            "aokvqa_v1p0_val.json": [
                {"question_id": "q1", "image_id": 139, "question": "Why?", "direct_answers": ["sun", "heat"]},
                {"question_id": "q2", "image_id": 139, "question": "Who?", "direct_answers": ["me"]}
                | {"difficult_direct_answer": True},
            ],
            "val2017/000000000139.jpg": 0,
        },
        [("q1", "000000000139.jpg", "Why?", ["sun", "heat"], "", [])],
    ),
    "a-okvqa-choices": (
        {
            "aokvqa_v1p0_val.json": [
                {"question_id": "q1", "image_id": 139, "question": "Why?", "choices": ["a", "b"]}
                | {"correct_choice_idx": 1, "direct_answers": ["sun"], "difficult_direct_answer": True},
            ],
            "val2017/000000000139.jpg": 0,
        },
        [("q1", "000000000139.jpg", "Why?", ["b"], "", ["a", "b"])],
    ),
    "gqa": (
        {
            "testdev_balanced_questions.json": {
                "201": {"imageId": "n1", "question": "Is it red?", "answer": "no", "types": {"structural": "verify"}}
            },
            "images/n1.jpg": 0,
        },
        [("201", "n1.jpg", "Is it red?", ["no"], "verify", [])],
    ),
    "vizwiz-vqa": (
        {
            "Annotations/val.json": [
                {"image": "V_1.jpg", "question": "What?", "answer_type": "other"}
                | {"answers": [{"answer": "soup", "answer_confidence": "yes"}] * 2}
            ],
            "val/V_1.jpg": 0,
        },
        [("V_1.jpg", "V_1.jpg", "What?", ["soup", "soup"], "other", [])],
    ),
    "textvqa": (
        {
            "TextVQA_0.5.1_val.json": {
                "data": [{"question_id": 3, "image_id": "f0", "question": "Brand?", "answers": ["nike"] * 10}]
            },
            "train_images/f0.jpg": 0,
        },
        [("3", "f0.jpg", "Brand?", ["nike"] * 10, "", [])],
    ),
    "scienceqa-img": (
        {
            "problems.json": {
                "5": {"question": "Which?", "hint": "Look.", "choices": ["x", "y"], "answer": 1}
                | {"image": "image.png", "split": "test", "subject": "natural science"},
                "6": {"question": "No image", "choices": ["x"], "answer": 0, "image": None, "split": "test"},
                "7": {"question": "Other", "choices": ["x"], "answer": 0, "image": "image.png", "split": "train"},
            },
            "test/5/image.png": 0,
        },
        [("5", "image.png", "Look.\nWhich?", ["y"], "natural science", ["x", "y"])],
    ),
    "pope": (
        {
            f"pope/coco_pope_{kind}.json": [
                {"question_id": 1, "image": "p.jpg", "text": "Is there a cat in the image?", "label": label}
            ]
            for kind, label in (("random", "yes"), ("popular", "no"))
        }
        | {"val2014/p.jpg": 0},
        [
            ("popular/1", "p.jpg", "Is there a cat in the image?", ["no"], "popular", []),
            ("random/1", "p.jpg", "Is there a cat in the image?", ["yes"], "random", []),
        ],
    ),
    "snli-ve": (
        {
            "snli_ve_test.jsonl": [
                {"Flickr30K_ID": "11", "pairID": "11#0r", "sentence2": "A man sits.", "gold_label": "contradiction"}
            ],
            "flickr30k-images/11.jpg": 0,
        },
        [
            (
                *("11#0r", "11.jpg", 'Does the image show that "A man sits."?', ["no"], "contradiction"),
                ["yes", "maybe", "no"],
            )
        ],
    ),
    "winoground": (
        {
            "examples.jsonl": [
                {"id": 0, "image_0": "ex_0_img_0", "image_1": "ex_0_img_1", "collapsed_tag": "Object"}
                | {"caption_0": "a b", "caption_1": "b a"}
            ],
            "images/ex_0_img_0.png": 0,
            "images/ex_0_img_1.png": 1,
        },
        [("0", "ex_0_img_0.png", None, ["text", "image", "group"], "Object", ["a b", "b a"])],
    ),
    "sugarcrepe": (
        {
            "data/add_att.json": {"0": {"filename": "s.jpg", "caption": "a dog", "negative_caption": "a red dog"}},
            "val2017/s.jpg": 0,
        },
        [("add_att/0", "s.jpg", None, ["a dog"], "add_att", ["a dog", "a red dog"])],
    ),
    "classes": (
        {"hot_dog/1.jpg": 0, "cat/2.png": 1},
        [
            ("cat/2.png", "2.png", None, ["cat"], "cat", ["cat", "hot dog"]),
            ("hot_dog/1.jpg", "1.jpg", None, ["hot dog"], "hot dog", ["cat", "hot dog"]),
        ],
    ),
}


@pytest.mark.parametrize("suite", CASES)
def test_published_files_are_read_as_items(suite: str, tmp_path: Path) -> None:
    files, expected = CASES[suite]
    rows = [
        (i.id, i.images[0].path.name, i.question, list(i.answers), i.kind, list(i.choices))  # type: ignore[attr-defined]
        for i in items_of(suite, write_files(tmp_path, files))
    ]
    assert rows == expected


@pytest.mark.parametrize("suite", [name for name in CASES if name != "classes"])
def test_damaged_files_and_missing_images_are_named(suite: str, tmp_path: Path) -> None:
    files, _ = CASES[suite]
    write_files(tmp_path, files)
    images = [name for name in files if name.endswith((".jpg", ".png"))]
    (tmp_path / images[0]).unlink()
    with pytest.raises(MLLMError, match=f"images are missing: .*{Path(images[0]).name}"):
        items_of(suite, tmp_path)
    table = next(name for name in files if name not in images)
    written = (tmp_path / table).read_text()
    (tmp_path / table).write_text(written[: len(written) // 2])
    with pytest.raises(MLLMError, match=f"{Path(table).name}.* is not JSON"):
        items_of(suite, tmp_path)
    (tmp_path / table).write_text('{"other": "form"}' if not written.startswith("[") else '[{"other": "form"}]')
    with pytest.raises(MLLMError, match=f"{Path(table).name}.*(expected|contains no items)"):
        items_of(suite, tmp_path)


def test_questions_without_annotations_are_a_test_split_or_a_mistake(tmp_path: Path) -> None:
    files, _ = CASES["vqav2"]
    write_files(tmp_path, files | {V2[1]: {"annotations": ANNOTATIONS[:1]}})
    with pytest.raises(MLLMError, match="question_id 420 is in one of them only"):
        items_of("vqav2", tmp_path)
    options = {"questions": str(tmp_path / V2[0]), "images": str(tmp_path / "val2014")}
    spec = DataSpec(format="vqa", name="COCO_val2014_{:012d}.jpg", **options)  # type: ignore[call-arg, arg-type]
    with pytest.raises(MLLMError, match="'420' has no answer"):
        read_all([spec])
    write_files(tmp_path, {V2[0]: {"questions": [*QUESTIONS, QUESTIONS[0]]}})
    with pytest.raises(MLLMError, match="question_id '420' belongs to several rows"):
        items_of("vqav2", tmp_path)


def test_a_test_split_is_answered_for_the_official_server(tmp_path: Path, tiny_model: Callable[..., Any]) -> None:
    write_files(tmp_path, {V2[0]: {"questions": QUESTIONS}, **VQA_IMAGES})
    overrides = ["folder.annotations=null", "metrics=[]"]
    model = tiny_model({"type": "linear", "tokens": 4})
    report = mllm.evaluate(model, "vqav2", tmp_path, out=tmp_path / "out", overrides=overrides)
    submitted = json.loads((tmp_path / "out/submission.json").read_text())
    assert submitted == [{"question_id": int(row["id"]), "answer": row["prediction"]} for row in report.rows]
    assert [row["question_id"] for row in submitted] == [420, 70] and report.summary["metrics"] == []
    with pytest.raises(MLLMError, match="Item 0 has no reference"):
        mllm.evaluate(model, "vqav2", tmp_path, overrides=overrides[:1])


def test_open_ended_mini_imagenet_defines_names_in_shots(tmp_path: Path, tiny_model: Callable[..., Any]) -> None:
    row = {"image_1": "1.jpg", "caption_1": "This is a dax.", "image_2": "2.jpg", "caption_2": "This is a blicket."}
    row |= {"question_image": "3.jpg", "question": "What is this?", "answer": "dax"}
    name = "open_ended_mi_shots_1_ways_2_all_questions.json"
    write_files(tmp_path, {name: [row], **{f"images/{i}.jpg": i for i in (1, 2, 3)}})
    model = tiny_model({"type": "linear", "tokens": 4})
    model.spec.prompt.question = "Q: {question} A:"
    report = mllm.evaluate(model, "open-ended-mini-imagenet", tmp_path, baselines=["blind"])
    folder = tmp_path / "images"
    prompt = [folder / "1.jpg", " This is a dax.\n", folder / "2.jpg", " This is a blicket.\n", folder / "3.jpg"]
    expected = model.generate([[*prompt, "Q: What is this? A:"]], max_new_tokens=10)[0]
    assert report.rows[0]["prediction"] == str(expected)


@pytest.mark.parametrize(
    ("suite", "name"),
    [("fast-vqa", "fast_vqa"), ("real-fast-vqa", "guided_vqa"), ("real-name-mini-imagenet", "real_name_mi")],
)
def test_suites_of_one_protocol_have_induction_inner_shots_and_repeats(
    suite: str, name: str, tmp_path: Path, tiny_model: Callable[..., Any]
) -> None:
    taught = [("1.jpg", "This is a dax."), ("2.jpg", "This is a fep house."), ("3.jpg", "This is a dax.")]
    row = {
        f"{key}_{n}": value
        for n, pair in enumerate(taught, 1)
        for key, value in zip(("image", "caption"), pair, strict=True)
    }
    row |= {"question_image": "4.jpg", "question": "What is the dax made of?", "answer": "wood"}
    write_files(tmp_path, {f"{name}_shots_1_ways_2_all_questions.json": [row], **{f"{i}.jpg": i for i in (1, 2, 3, 4)}})
    model = tiny_model({"type": "linear", "tokens": 1})
    model.spec.prompt.question = "Q: {question} A:"

    def answered(*overrides: str) -> str:
        report = mllm.evaluate(model, suite, tmp_path, baselines=["blind"], overrides=list(overrides))
        return str(report.rows[0]["prediction"])

    def expected(*pieces: str) -> str:
        shown = [tmp_path / piece if piece.endswith(".jpg") else piece for piece in pieces]
        asked = [*shown, tmp_path / "4.jpg", "Q: What is the dax made of? A:"]
        return str(model.generate([asked], max_new_tokens=10)[0])

    one = [*("1.jpg", " This is a dax.\n"), *("2.jpg", " This is a fep house.\n")]
    third = ["3.jpg", " This is a dax.\n"]
    assert answered() == expected(*one, *third)
    assert answered("shots.inner=1", "shots.repeats=2") == expected(*one, *one)
    before = 'shots.before="Answer with {answers}."'
    assert answered(before, "shots.inner=1") == expected("Answer with dax or fep house.\n", *one)
    assert answered(before, "shots.repeats=2") == expected("Answer with dax or fep house.\n", *(one + third) * 2)


@pytest.mark.parametrize(
    ("texts", "names"),
    [
        (["This is a dax.", "This is a blicket."], ["dax", "blicket"]),
        (["dax", "slation"], ["dax", "slation"]),
        (["an old dog here", "an old brown cat here", "an old eel here"], ["dog", "brown cat", "eel"]),
        (["This is a dax."], ["This is a dax"]),
        (["a a b", "a b"], ["a", ""]),
        ([], []),
    ],
)
def test_words_of_the_task_are_those_that_differ(texts: list[str], names: list[str]) -> None:
    assert import_module("mllm.eval.shots").differences(texts) == names


def encoded(seed: int) -> bytes:
    buffer = io.BytesIO()
    tiny_image(seed).save(buffer, "PNG")
    return buffer.getvalue()


def mirrored(folder: Path, **columns: list[Any]) -> Path:
    images = [{"bytes": encoded(seed), "path": f"{seed}.png"} for seed in range(2)]
    pyarrow.parquet.write_table(pyarrow.table({"image": images, **columns}), folder / "val-00000-of-00001.parquet")
    return folder


def test_parquet_files_replace_the_authors_files(tmp_path: Path) -> None:
    answers = [[{"answer": "two", "answer_confidence": "yes"}] * 2, [{"answer": "red"}]]
    columns: dict[str, Any] = {"question": ["How many?", "Colour?"], "answers": answers, "question_id": [7, 9]}
    folder = mirrored(tmp_path, **columns, answer_type=["number", "other"])
    items = items_of("vqav2", folder)
    assert [(i.id, i.question, i.answers, i.kind) for i in items] == [
        ("7", "How many?", ("two", "two"), "number"),
        ("9", "Colour?", ("red",), "other"),
    ]
    assert [i.images[0].open().tobytes() for i in items] == [tiny_image(seed).tobytes() for seed in range(2)]
    with pytest.raises(MLLMError, match=r"no column 'caption_str'.*Known: answer_type, answers"):
        items_of("textcaps", folder)


def test_an_answer_in_parquet_may_be_an_index_of_a_choice(tmp_path: Path) -> None:
    columns: dict[str, Any] = {"question": ["a", "b"], "subject": ["x", "x"], "choices": [["u", "v"], ["w", "z"]]}
    (first, second) = items_of("scienceqa-img", mirrored(tmp_path, **columns, answer=[1, 0]))
    assert (first.answers, first.choices, second.answers) == (("v",), ("u", "v"), ("w",))
    with pytest.raises(MLLMError, match="row 1: the answer is 2; expected 0 to 1"):
        items_of("scienceqa-img", mirrored(tmp_path, **columns, answer=[0, 2]))
    (tmp_path / "val-00000-of-00001.parquet").write_bytes(b"PAR1 cut")
    with pytest.raises(MLLMError, match="cannot be read"):
        items_of("scienceqa-img", tmp_path)
