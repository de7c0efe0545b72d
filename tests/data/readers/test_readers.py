"""Test the readers of common formats: every row is read, and errors name the file and the row."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mllm.config.data import DataSpec
from mllm.config.prompt import PromptSpec
from mllm.data.items import Item, pieces_of, question_text
from mllm.data.readers.captions import caption_folder, caption_lines, coco_captions
from mllm.data.readers.tables import table
from mllm.data.sources import Source, read
from mllm.data.stream import Stream
from mllm.errors import MLLMError
from mllm.media.images import ImageFile
from mllm.prompts.pieces import Target


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    for index, name in enumerate(("a.png", "b.png", "images/a.png")):
        Image.new("RGB", (2, 2), (index, 0, 0)).save(tmp_path / name)
    return tmp_path


def coco(folder: Path, images: Any, annotations: Any) -> Sequence[Item]:
    (folder / "coco.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    return coco_captions(annotations=str(folder / "coco.json"), images=str(folder))


def rows(folder: Path, name: str, text: str) -> list[tuple[Any, ...]]:
    (folder / name).write_text(text, encoding="utf-8")
    return [
        (item.id, str(item.images[0].path.relative_to(folder)), item.answers, item.question)
        for item in table(path=str(folder / name))
        if isinstance(item.images[0], ImageFile)
    ]


A, B = {"id": 7, "file_name": "a.png"}, {"id": "x", "file_name": "b.png"}


def test_coco_groups_the_captions_of_an_image(folder: Path) -> None:
    items = coco(
        folder,
        [A, B, {"id": 9, "file_name": "never captioned, so never read.png"}],
        [
            {"image_id": 7, "caption": " one \n"},
            {"image_id": "x", "caption": "other"},
            {"image_id": 7, "caption": "two"},
            {"image_id": 7, "caption": "  "},
        ],
    )
    assert [(item.id, item.answers, item.question) for item in items] == [
        ("7", ("one", "two"), None),
        ("x", ("other",), None),
    ]
    assert [item.images for item in items] == [(ImageFile(folder / "a.png"),), (ImageFile(folder / "b.png"),)]


def test_coco_names_what_is_missing(folder: Path) -> None:
    with pytest.raises(MLLMError, match="annotations, row 1: its image 1 is not listed in 'images'"):
        coco(folder, [A], [{"image_id": number, "caption": "x"} for number in (1, 2, 3, 4)])
    gone = [{"id": number, "file_name": f"gone-{number}.png"} for number in range(5)]
    captions = [{"image_id": number, "caption": "x"} for number in (0, 1, 2, 3, 4, 7)]
    with pytest.raises(MLLMError, match=r"5 of 6 images are missing: .*gone-0.png, .*gone-2.png and 2 more"):
        coco(folder, [*gone, A], captions)
    with pytest.raises(MLLMError, match="contains no items"):
        coco(folder, [A], [])


@pytest.mark.parametrize(
    "content",
    [
        "null",
        "[]",
        '{"images": []}',
        '{"images": [{"id": 1}], "annotations": []}',
        '{"images": [{"id": 1, "file_name": 5}], "annotations": []}',
        '{"images": [{"id": [1], "file_name": "a.png"}], "annotations": []}',
        '{"images": [], "annotations": [{"image_id": 1}]}',
        '{"images": {"id": 1}, "annotations": []}',
    ],
)
def test_malformed_coco_files_are_refused(folder: Path, content: str) -> None:
    (folder / "coco.json").write_text(content)
    with pytest.raises(MLLMError, match=r"coco.json.*(expected|is not listed)"):
        coco_captions(annotations=str(folder / "coco.json"), images=str(folder))


@pytest.mark.parametrize("name", ["../secret.png", "/etc/hostname", "images/../../secret.png"])
def test_a_data_file_cannot_name_images_outside_its_folder(folder: Path, name: str) -> None:
    inside = folder / "images"
    (folder / "coco.json").write_text(
        json.dumps({"images": [{"id": 1, "file_name": name}], "annotations": [{"image_id": 1, "caption": "x"}]})
    )
    with pytest.raises(MLLMError, match=r"is outside of .*images. Set 'images'"):
        coco_captions(annotations=str(folder / "coco.json"), images=str(inside))
    (folder / "t.jsonl").write_text(json.dumps({"image": name, "caption": "x"}))
    with pytest.raises(MLLMError, match="is outside of"):
        table(path=str(folder / "t.jsonl"), images=str(inside))


def test_an_image_outside_is_read_if_the_folder_contains_it(folder: Path) -> None:
    (folder / "t.jsonl").write_text(json.dumps({"image": str(folder / "a.png"), "caption": "x"}))
    (item,) = table(path=str(folder / "t.jsonl"), images="/")
    assert item.images == (ImageFile(folder / "a.png"),)


CAPTIONS = [("a.png", "a.png", ("one", "two, too"), None), ("b.png", "b.png", ('say "b"',), None)]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("t.csv", 'image,caption\na.png,one\nb.png,"say ""b"""\na.png,"two, too"\n'),
        ("t.CSV", '\ufeffcaption,image,source\r\none,a.png,web\r\n"say ""b""",b.png,\r\n"two, too",a.png,web\r\n'),
        ("t.tsv", 'image\tcaption\na.png\tone\nb.png\tsay "b"\na.png\ttwo, too\n'),
        (
            "t.json",
            '[{"image": "a.png", "caption": ["one", " two, too "]}, {"image": "b.png", "caption": "say \\"b\\""}]',
        ),
        (
            "t.jsonl",
            '{"image": "a.png", "caption": ["one", "two, too"]}\n\n{"image": "b.png", "caption": "say \\"b\\""}',
        ),
    ],
)
def test_tables_of_captions(folder: Path, name: str, text: str) -> None:
    assert rows(folder, name, text) == CAPTIONS


QUESTIONS = [
    ("a.png#how many?", "a.png", ("0", "none"), "how many?"),
    ("a.png#what?", "a.png", ("cat",), "what?"),
]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("q.csv", "image,question,answer\na.png,how many?,0\na.png,what?,cat\na.png,how many?,none\n"),
        ("q.tsv", "image\tquestion\tanswer\na.png\thow many?\t0\na.png\twhat?\tcat\na.png\thow many?\tnone\n"),
        (
            "q.json",
            '[{"image": "a.png", "question": "how many?", "answer": [0, "none"]},'
            '{"image": "a.png", "question": "what?", "answer": "cat", "caption": null}]',
        ),
    ],
)
def test_tables_of_questions(folder: Path, name: str, text: str) -> None:
    assert rows(folder, name, text) == QUESTIONS


def test_line_breaks_inside_a_field_belong_to_it(folder: Path) -> None:
    assert rows(folder, "t.csv", 'image,caption\na.png,"one\nline"\n')[0][2] == ("one\nline",)
    strange = "one\u2028line\x0bor\x85two"  # str.splitlines would cut here, JSON lines end at \n only
    assert rows(folder, "t.jsonl", json.dumps({"image": "a.png", "caption": strange}, ensure_ascii=False))[0][2] == (
        strange,
    )
    assert rows(folder, "t.csv", f"image,caption\na.png,{strange}\n")[0][2] == (strange,)


def test_images_may_be_in_another_folder(folder: Path) -> None:
    (folder / "t.csv").write_text("image,caption\na.png,x\n")
    (item,) = table(path=str(folder / "t.csv"), images=str(folder / "images"))
    assert item.images == (ImageFile(folder / "images" / "a.png"),)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("t.csv", "img,caption\na.png,x\n", r"t.csv, row 1: no 'image'; columns found: img, caption"),
        ("t.csv", "image,text\na.png,x\n", r"row 1: neither a 'caption' nor a 'question'.*columns found: image, text"),
        ("t.csv", "image,question\na.png,what?\n", r"row 1: neither a 'caption'.*columns found: image, question"),
        ("t.csv", "image,caption\na.png,x\na.png,  \n", r"row 2: neither a 'caption'"),
        ("t.csv", "image,caption\na.png\n", r"row 1: 1 fields \(line 2\), but the header has 2"),
        ("t.csv", "image,caption\n,x\n", r"row 1: no 'image'"),
        ("t.csv", "image,caption\n", r"t.csv contains no items"),
        ("t.csv", "", r"t.csv contains no items"),
        ("t.csv", "image,caption\na.png,x\nc.png,y\n", r"1 of 2 images are missing: .*c.png"),
        ("t.csv", "image,caption\na.png," + "x" * 200_000, r"t.csv, row 1: field larger"),
        ("t.json", '[{"image": "a.png", "capt', r"t.json is not JSON"),
        ("t.json", '{"image": "a.png"}', r"t.json has an unexpected form: it is no list of rows; expected a list"),
        ("t.json", '["a.png"]', r"row 1: 'a.png' is not a row"),
        ("t.json", '[{"image": [], "caption": "x"}]', r"row 1: no 'image'"),
        ("t.jsonl", '{"image": "a.png", "caption": "x"}\n{"image": "b.p', r"t.jsonl, line 2: it is not JSON"),
        ("t.xlsx", "", r"unknown file type '.xlsx'. Known: .csv, .json, .jsonl, .tsv"),
        ("t", "", r"unknown file type ''"),
    ],
)
def test_malformed_tables_are_refused(folder: Path, name: str, text: str, message: str) -> None:
    with pytest.raises(MLLMError, match=message):
        rows(folder, name, text)


def test_files_that_cannot_be_read(folder: Path) -> None:
    (folder / "latin.csv").write_bytes("image,caption\na.png,caf\xe9\n".encode("latin-1"))
    for name in ("latin.csv", "none.csv", "none.json"):
        with pytest.raises(MLLMError, match=f"{name} cannot be read"):
            table(path=str(folder / name))
    with pytest.raises(MLLMError, match=r"none.json cannot be read"):
        coco_captions(annotations=str(folder / "none.json"), images=str(folder))


def test_reading_by_a_recipes_source(folder: Path) -> None:
    (folder / "t.csv").write_text("image,caption\na.png,x\n")
    assert len(read(DataSpec(format="table", path=str(folder / "t.csv")))) == 1  # type: ignore[call-arg]
    for options, message in (
        ({"format": "tabel"}, "Did you mean 'table'"),
        ({"format": "table"}, "does not accept these arguments: missing.*'path'.*It accepts: path, images"),
        ({"format": "table", "pth": "x"}, "does not accept these arguments: .*It accepts: path, images"),
    ):
        with pytest.raises(MLLMError, match=message):
            read(DataSpec(**options))  # type: ignore[arg-type]


def test_examples_are_shuffled_every_epoch_alike_in_every_run(folder: Path) -> None:
    items = [Item(str(number), (ImageFile(folder / "a.png"),), (str(number),)) for number in range(20)]
    answers = [
        [
            pieces[-1].text.strip()
            for pieces in Stream([Source(DataSpec(format="table"), items)], PromptSpec(), seed=seed).take(40)
        ]
        for seed in (0, 0, 1)
    ]
    assert answers[0] == answers[1] != answers[2]
    first, second = answers[0][:20], answers[0][20:]
    assert sorted(first) == sorted(second) == sorted(item.id for item in items)
    assert first != second


def test_sources_are_sampled_by_weight(folder: Path) -> None:
    image = (ImageFile(folder / "a.png"),)
    sources = [
        Source(DataSpec(format="table", weight=weight), [Item(name, image, (name,))])
        for weight, name in ((3.0, "a"), (1.0, "b"))
    ]
    sampled = [pieces[-1].text.strip() for pieces in Stream(sources, PromptSpec(), seed=0).take(4000)]
    assert abs(sampled.count("a") / 4000 - 0.75) < 0.03  # four standard deviations


def test_a_question_is_put_into_the_prompt_and_a_caption_is_not() -> None:
    prompt = PromptSpec(caption="It shows", question="Q: {question} A:")
    asked = Item("1", (), ("blue",), question="{colour}?")
    assert question_text(asked, prompt) == "Q: {colour}? A:"
    assert pieces_of(Item("1", (), ("a cat ",)), prompt, "a cat ") == ["It shows", Target(" a cat")]


def test_lines_of_captions_and_images(folder: Path) -> None:
    (folder / "cc.tsv").write_text("a red dog\ta.png\nit\tb.png\r\na dog\ta.png\n\n")
    items = caption_lines(path=str(folder / "cc.tsv"), images=str(folder))
    assert [(item.id, item.answers) for item in items] == [("a.png", ("a red dog", "a dog")), ("b.png", ("it",))]
    for line in ("no tab", "\ta.png", "a\tb.png\tc"):
        (folder / "cc.tsv").write_text(f"a dog\ta.png\n{line}\n")
        with pytest.raises(MLLMError, match=r"cc\.tsv, line 2: it is .*one tab"):
            caption_lines(path=str(folder / "cc.tsv"), images=str(folder))


def test_a_folder_of_images_with_text_files(folder: Path) -> None:
    for name, text in (("a", "a dog\nthe dog\n"), ("b", "a cat"), ("images/a", "a bus")):
        (folder / f"{name}.txt").write_text(text)
    items = caption_folder(path=str(folder))
    assert [(i.id, i.answers) for i in items] == [
        ("a.png", ("a dog", "the dog")),
        ("b.png", ("a cat",)),
        ("images/a.png", ("a bus",)),
    ]
    (folder / "b.txt").write_text(" \n")
    with pytest.raises(MLLMError, match=r"b\.png: b\.txt is empty"):
        caption_folder(path=str(folder))
    (folder / "b.txt").unlink()
    with pytest.raises(MLLMError, match=r"b\.txt cannot be read"):
        caption_folder(path=str(folder))
