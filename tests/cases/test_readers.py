"""Data files as people bring them: hidden files, tables of other programs, and conversations that do not alternate."""

from __future__ import annotations

import base64
import bz2
import contextlib
import gzip
import io
import json
import lzma
import math
import sys
import tarfile
import unicodedata
from pathlib import Path
from typing import Any

import pytest

from mllm.__main__ import main
from mllm.config.data import DataSpec
from mllm.config.prompt import PromptSpec
from mllm.data.items import Item, pieces_of
from mllm.data.readers.captions import caption_folder, coco_captions
from mllm.data.readers.conversations import llava, messages
from mllm.data.readers.questions import vqa
from mllm.data.readers.tables import table
from mllm.data.readers.tars import webdataset
from mllm.data.sources import Source, check_learnable
from mllm.data.stream import Stream
from mllm.errors import MLLMError
from mllm.media.images import ImageFile, find_images
from mllm.prompts.pieces import images_of
from mllm.testing import tiny_image

# Hidden files, which macOS writes beside every file on a disk of another kind.

APPLE_DOUBLE = b"\0\5\x16\7\0\2\0\0Mac OS X        " + b"\0" * 100


@pytest.fixture(scope="module")
def macos_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two images with captions, and what macOS adds."""
    folder = tmp_path_factory.mktemp("macos")
    for name in ("a", "b"):
        tiny_image(1).save(folder / f"{name}.jpg")
        (folder / f"{name}.txt").write_text("a cat\n")
    for name in ("._a.jpg", "._a.txt", ".DS_Store"):
        (folder / name).write_bytes(APPLE_DOUBLE)
    return folder


def tar(path: Path, members: dict[str, bytes]) -> str:
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return str(path)


def test_hidden_files_are_no_images_of_a_folder(macos_folder):
    assert [path.name for path in find_images([macos_folder])] == ["a.jpg", "b.jpg"]


def test_hidden_files_are_no_captioned_images(macos_folder):
    assert len(caption_folder(path=str(macos_folder))) == 2


def test_hidden_files_are_no_samples_of_a_tar(macos_folder, tmp_path):
    image = (macos_folder / "a.jpg").read_bytes()
    members = {"._0001.jpg": APPLE_DOUBLE, "0001.jpg": image, "._0001.txt": APPLE_DOUBLE, "0001.txt": b"a cat"}
    path = tar(tmp_path / "macos.tar", {**members, ".DS_Store": APPLE_DOUBLE})
    assert [item.answers for item in webdataset(path=path)] == [("a cat",)]


def test_a_tar_with_dots_in_folders_capitals_and_long_names(macos_folder, tmp_path):
    image, caption = (macos_folder / "a.jpg").read_bytes(), "ein Kätzchen"
    names = {"dir.v1/0001": "jpg", "dir.v1/0002": "JPG", f"dir.v1/ü{'n' * 130}": "jpg", "./0003": "jpg"}
    members: dict[str, bytes] = {}
    for name, suffix in names.items():
        members |= {f"{name}.{suffix}": image, f"{name}.txt": caption.encode()}
    items = webdataset(path=tar(tmp_path / "names.tar", members))
    assert [item.answers for item in items] == [(caption,)] * len(names)
    assert {item.images[0].open().size for item in items} == {tiny_image(1).size}


def test_hidden_files_are_not_captioned_by_the_command(macos_folder, model_of, tmp_path, monkeypatch, capsys):
    run = model_of().save(tmp_path / "run")
    monkeypatch.setattr(sys, "argv", ["mllm", "caption", str(run), str(macos_folder), "--jsonl"])
    with contextlib.suppress(SystemExit):
        main()
    captions = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [Path(caption["image"]).name for caption in captions] == ["a.jpg", "b.jpg"]


# Captions and questions: identifiers twice, and values that are no text.

NAMES = [
    "a.png",
    "b.png",
    "ü.png",
    unicodedata.normalize("NFD", "é.png"),
    "with space.png",
    "a#1.png",
    "c,d.png",
    "1.png",
    "2.png",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of images with all kinds of names."""
    place = tmp_path_factory.mktemp("images")
    (place / "写真").mkdir()
    for name in (*NAMES, "写真/ü ö.png"):
        tiny_image(1).save(place / name)
    return place


@pytest.fixture
def coco(folder, tmp_path):
    """Return a function that reads images and annotations as COCO has them."""

    def read(images: list[dict[str, Any]], *annotations: dict[str, Any]) -> Any:
        path = tmp_path / "coco.json"
        path.write_text(json.dumps({"images": images, "annotations": list(annotations)}))
        return coco_captions(annotations=str(path), images=str(folder))

    return read


A, B = {"id": 1, "file_name": "a.png"}, {"id": 1, "file_name": "b.png"}
CAT = {"image_id": 1, "caption": "cat"}


def test_one_id_for_two_files_is_refused(coco):
    with pytest.raises(MLLMError, match="the image id '1' belongs to several rows"):
        coco([A, B], CAT)


def test_one_row_twice_is_one_item(coco):
    assert [item.answers for item in coco([A, A], CAT)] == [("cat",)]


def test_two_ids_of_one_file_are_two_items(coco):
    items = coco([A, {**A, "id": 2}], CAT, {**CAT, "image_id": 2})
    assert [item.answers for item in items] == [("cat",), ("cat",)]


def test_ids_that_are_a_text_and_a_number_are_joined(coco):
    assert [item.answers for item in coco([{**A, "id": "1"}], CAT)] == [("cat",)]


@pytest.mark.parametrize("caption", [float("nan"), True, 7, {"text": "cat"}, [["cat"]], "a \ud800"], ids=repr)
def test_a_caption_that_is_no_text_is_refused(coco, caption):
    with pytest.raises(MLLMError, match=r"coco\.json, annotations, row 2: the caption"):
        coco([A], CAT, {**CAT, "caption": caption})


def test_an_image_with_empty_captions_alone_is_refused(coco):
    with pytest.raises(MLLMError, match=r"coco\.json, image 1: it has no caption"):
        coco([A], {**CAT, "caption": None}, {**CAT, "caption": "  "})


def test_a_caption_that_is_null_is_left_out(coco):
    assert [item.answers for item in coco([A], {**CAT, "caption": None}, CAT)] == [("cat",)]


def test_an_image_without_captions_may_be_missing(coco):
    assert [item.answers for item in coco([A, {"id": 2, "file_name": "gone.png"}], CAT)] == [("cat",)]


@pytest.fixture
def questions(folder, tmp_path):
    """Return a function that reads one question and its annotations as VQA has them."""

    def read(*annotations: tuple[Any, list[str]]) -> Any:
        asked = {"question_id": 1, "image_id": "a", "question": "Was ist das? 你好 {x} <image> <|end|>"}
        rows = [{"question_id": id_, "answers": [{"answer": a} for a in answers]} for id_, answers in annotations]
        paths = tmp_path / "questions.json", tmp_path / "annotations.json"
        paths[0].write_text(json.dumps({"questions": [asked]}))
        paths[1].write_text(json.dumps({"annotations": rows}))
        return vqa(questions=str(paths[0]), annotations=str(paths[1]), images=str(folder), name="{}.png")

    return read


def test_answers_that_are_all_empty_are_refused(questions):
    with pytest.raises(MLLMError, match=r"annotations\.json, question_id 1: all answers are empty"):
        questions((1, [""] * 10))


def test_an_empty_answer_beside_others_is_an_annotator_and_is_not_learned(questions):
    (item,) = questions((1, ["", "yes", " "]))
    assert item.answers == ("", "yes", " ")  # the official score counts annotators
    stream = Stream([Source(DataSpec(format="vqa"), [item])], PromptSpec(), seed=0)
    assert {pieces[-1].text for pieces in stream.take(20)} == {" yes"}


def test_an_item_with_empty_answers_alone_has_nothing_to_learn():
    with pytest.raises(MLLMError, match="has no answer"):
        check_learnable(Item("1", (), ("", " ")))


def test_a_question_that_is_annotated_twice_is_refused(questions):
    with pytest.raises(MLLMError, match="the question_id '1' belongs to several rows"):
        questions((1, ["yes"]), (1, ["no"]))


def test_question_ids_that_are_a_text_and_a_number_are_joined(questions):
    assert [item.answers for item in questions(("1", ["yes"]))] == [("yes",)]


def test_a_question_with_braces_marks_and_control_tokens_is_answered(model_of):
    view = model_of().see([tiny_image(1)])
    assert isinstance(view.ask("What is {this}? <image> <|end|>", max_new_tokens=2), str)


# Tables as spreadsheets, pandas and editors write them.


@pytest.fixture
def read_table(folder):
    """Return a function that reads a table beside the images, and returns the answers of its rows."""
    paths = []

    def read(data: str | bytes, name: str = "table.csv") -> list[tuple[str, ...]]:
        path = folder / name
        paths.append(path)
        path.write_bytes(data.encode() if isinstance(data, str) else data)
        return [tuple(item.answers) for item in table(path=str(path))]

    yield read
    for path in paths:
        path.unlink(missing_ok=True)


QUESTIONS = "image,question,answer\n"


@pytest.mark.parametrize(
    ("data", "answers"),
    [
        pytest.param(
            b'\xef\xbb\xbfimage,caption\r\na.png,a cat\r\nb.png,"two\r\nlines"\r\n',
            ["a cat", "two\nlines"],
            id="BOM-and-CRLF",
        ),
        pytest.param(
            'image,caption\nü.png,größer 你好 🐈\nwith space.png,x\n"c,d.png",y\na#1.png,z\n',
            ["größer 你好 🐈", "x", "y", "z"],
            id="names",
        ),
        pytest.param("image,caption\n\na.png,x\n\n", ["x"], id="empty-lines"),
        pytest.param(f"{QUESTIONS}a.png,What?,None\nb.png,Any?,NA\n", ["None", "NA"], id="None-and-NA"),
        pytest.param("image,caption,question,answer\na.png,,What?,0\n", ["0"], id="zero"),
    ],
)
def test_a_csv_file_is_read(read_table, data, answers):
    assert read_table(data) == [(answer,) for answer in answers]


def test_an_absolute_path_inside_the_folder_is_read(read_table, folder):
    assert read_table(f"image,caption\n{folder / 'a.png'},x\n") == [("x",)]


def test_an_answer_that_is_a_number_is_read(read_table):
    rows = [{"image": "a.png", "question": "How many?", "answer": 0}]
    assert read_table(json.dumps(rows), "table.json") == [("0",)]


def test_json_lines_with_bom_crlf_and_line_separators_are_read(read_table):
    data = '\ufeff{"image": "a.png", "caption": "x"}\r\n\r\n{"image": "b.png", "caption": "a\u2028b"}\r\n'
    assert len(read_table(data, "table.jsonl")) == 2


def test_a_caption_that_pandas_left_out_is_refused(read_table):
    rows = '{"image": "b.png", "caption": "x"}\n{"image": "a.png", "caption": NaN}\n'
    with pytest.raises(MLLMError, match=r"table\.jsonl, line 2: neither a 'caption'"):
        read_table(rows, "table.jsonl")


def test_columns_that_pandas_left_empty_are_no_values(read_table):
    rows = [
        {"image": "a.png", "caption": "x", "question": math.nan, "answer": math.nan},
        {"image": "b.png", "caption": math.nan, "question": "How many?", "answer": 0},
    ]
    assert read_table(json.dumps(rows), "table.json") == [("x",), ("0",)]


@pytest.mark.parametrize(
    ("name", "compress"),
    [("t.jsonl.gz", gzip.compress), ("t.jsonl.bz2", bz2.compress), ("t.jsonl.xz", lzma.compress)],
)
def test_a_compressed_file_is_read(read_table, name, compress):
    data = compress(b'{"image": "a.png", "caption": "x"}\n')
    assert read_table(data, name) == [("x",)]
    with pytest.raises(MLLMError, match=f"{name} cannot be read: .*complete"):
        read_table(data[:-9], name)


@pytest.mark.parametrize(
    ("data", "named"),
    [
        pytest.param("image;caption\na.png;x\n", "image;caption", id="semicolons"),
        pytest.param("Image,Caption\na.png,x\n", "Image, Caption", id="capitals"),
        pytest.param("image,caption\na.png\n", "row 1: 1 fields", id="field-too-few"),
        pytest.param("image,caption\nb.png,x\n0.png,a dog, brown\n", "row 2: 3 fields", id="field-too-many"),
        pytest.param("image,caption,caption\na.png,x,y\n", "'caption' is there twice", id="column-twice"),
        pytest.param(f"image,caption\na.png,{'x' * 200000}\n", "row 1: field larger", id="long-field"),
        pytest.param("image,caption\na.png,x\0y\n", "row 1: the caption .* NUL", id="NUL"),
        pytest.param("image,caption\né.png,x\n", "é.png", id="NFC-name-of-an-NFD-file"),
        pytest.param("image,caption\n.\\a.png,x\n", r"1 of 1 images are missing: .*a\.png", id="Windows-path"),
        pytest.param(f"image,caption\n{'x' * 300}.png,x\n", "1 of 1 images are missing", id="name-over-255-bytes"),
        pytest.param(
            "image,caption,question,answer\na.png,x,What?,y\n", "both a 'caption' and a 'question'", id="both"
        ),
        pytest.param(
            "image,caption\na.png,größer\n".encode("latin-1"),
            r"table\.csv cannot be read: line 2 has a byte 0xf6",
            id="Latin-1",
        ),
        pytest.param(
            "image,caption\na.png,x\n".encode("utf-16"), r"table\.csv cannot be read: it is UTF-16", id="UTF-16"
        ),
        pytest.param("image,caption\nA.PNG,x\n", "A.PNG", id="name-in-capitals"),
        pytest.param("image,caption\nhttp://x.y/a.png,x\n", "x.y/a.png", id="URL"),
    ],
)
def test_what_is_no_table_of_images_is_refused_by_name(read_table, data, named):
    with pytest.raises(MLLMError, match=named):
        read_table(data)


# Conversations as LLaVA writes them.


@pytest.fixture
def conversation(folder, tmp_path):
    """Return a function that reads rows of LLaVA's format: one of these turns, or a whole file's text."""

    def read(*turns: tuple[str, str], file: str | None = None, task: Any = "conversations", **row: Any) -> Any:
        path = tmp_path / "rows.json"
        conversations = [{"from": who, "value": text} for who, text in turns]
        path.write_text(json.dumps([{"id": "1", "conversations": conversations, **row}]) if file is None else file)
        return llava(path=str(path), images=str(folder), task=task)

    return read


@pytest.fixture(scope="module")
def images_in_prompt(model_of):
    """Return a function: how many images the prompt of an item has."""
    model = model_of()
    return lambda item: len(images_of(pieces_of(item, model.spec.prompt, lm=model.lm)))


ASKED, ANSWERED = ("human", "<image>\nq"), ("gpt", "A cat.")


def test_a_conversation_without_a_question_is_refused(conversation):
    with pytest.raises(MLLMError, match=r"rows\.json, row 1: there is no turn of the user"):
        conversation(ANSWERED, image="1.png")


def test_a_caption_needs_no_question(conversation):
    assert [item.answers for item in conversation(ANSWERED, task="captions", image="1.png")] == [("A cat.",)]


def test_a_system_turn_and_an_answer_alone_are_refused(conversation):
    with pytest.raises(MLLMError, match="there is no turn of the user"):
        conversation(("system", "s"), ANSWERED, image="1.png")


def test_a_conversation_that_the_assistant_starts_is_read(conversation):
    assert len(conversation(("gpt", "Hello."), ASKED, ANSWERED, image="1.png")[0].messages) == 3


@pytest.mark.parametrize(
    "turns",
    [[], [ASKED, ("gpt", "")], [ASKED, ANSWERED, ("human", "r"), ("gpt", " ")], [("human", ""), ANSWERED]],
    ids=["no-turns", "empty-answer", "one-empty-answer", "empty-question"],
)
def test_a_conversation_without_an_answer_or_a_question_is_refused(conversation, turns):
    with pytest.raises(MLLMError, match=r"rows\.json, row 1: (no turn|the text of a turn is empty)"):
        conversation(*turns, image="1.png")


@pytest.mark.parametrize("speaker", ["chatgpt", "bing", "bard", "observation", None, 1])
def test_an_unknown_speaker_is_refused(conversation, speaker):
    with pytest.raises(MLLMError, match=r"row 1: (no role is called|the speaker is)"):
        conversation(("human", "<image>q"), (speaker, "a"), image="1.png")


@pytest.mark.parametrize(("asks", "answers"), [("Human", "GPT"), ("USER", "ASSISTANT")])
def test_a_speaker_in_capitals_is_read(conversation, asks, answers):
    (item,) = conversation((asks, "<image>q"), (answers, "a"), image="1.png")
    assert [message["role"] for message in item.messages] == ["user", "assistant"]


@pytest.mark.parametrize(
    "turns",
    [
        pytest.param([("human", "<image>\n<image>\nSame?"), ("gpt", "No.")], id="one-turn"),
        pytest.param([ASKED, ANSWERED, ASKED, ANSWERED], id="two-turns"),
    ],
)
def test_two_marks_are_two_images(conversation, images_in_prompt, turns):
    (item,) = conversation(*turns, image=["1.png", "2.png"])
    assert [image.path.name for image in item.images] == ["1.png", "2.png"]
    assert images_in_prompt(item) == 2


@pytest.mark.parametrize(
    ("turns", "images"),
    [
        ([ASKED, ANSWERED, ASKED, ANSWERED], "1.png"),
        ([ASKED, ANSWERED], ["1.png", "2.png"]),
        ([ASKED, ("gpt", "See <image>.")], "1.png"),
        ([ASKED, ANSWERED], None),
    ],
    ids=["too-many", "too-few", "in-an-answer", "text-alone"],
)
def test_other_numbers_of_marks_than_images_are_refused(conversation, turns, images):
    with pytest.raises(MLLMError, match=r"rows\.json, row 1: \d marks <image> for \d images"):
        conversation(*turns, image=images)


@pytest.mark.parametrize("image", [None, "", []], ids=repr)
def test_a_conversation_without_an_image_is_text_alone(conversation, image):
    (item,) = conversation(("human", "q"), ("gpt", "a"), image=image)
    assert not item.images


def test_a_unicode_path_with_blanks_is_read(conversation):
    (item,) = conversation(ASKED, ANSWERED, image="写真/ü ö.png")
    assert item.images[0].open().size == tiny_image(1).size


def row(number: int = 1) -> dict[str, Any]:
    turns = [{"from": "human", "value": "<image>q"}, {"from": "gpt", "value": "a"}]
    return {"id": str(number), "image": "1.png", "conversations": turns}


def test_a_file_with_a_bom_is_read(conversation):
    assert len(conversation(file="\ufeff" + json.dumps([row()]))) == 1


def test_json_lines_instead_of_a_list_are_read(conversation):
    assert len(conversation(file="\n".join(json.dumps(row(number)) for number in range(2)))) == 2


# Messages as OpenAI and transformers write them.


@pytest.fixture
def chat(folder, tmp_path):
    """Return a function that reads one row of messages, and returns its item."""

    def read(*turns: tuple[str, Any], **row: Any) -> Any:
        path = tmp_path / "rows.jsonl"
        path.write_text(json.dumps({"messages": [{"role": who, "content": what} for who, what in turns], **row}))
        (item,) = messages(path=str(path), images=str(folder))
        return item

    return read


@pytest.mark.parametrize(
    ("turns", "problem"),
    [
        pytest.param([("assistant", "A cat.")], "there is no turn of the user", id="no-question"),
        pytest.param(
            [("user", "<image>q"), ("assistant", None), ("user", "r"), ("assistant", "a")],
            "the text of a turn is None",
            id="content-null",
        ),
        pytest.param([("user", "q"), ("tool", "x"), ("assistant", "a")], "no role is called 'tool'", id="tool"),
        pytest.param([("user", [{"type": "audio"}]), ("assistant", "a")], "a part has the type 'audio'", id="audio"),
        pytest.param(
            [("user", [{"type": "image_url", "image_url": {"url": "https://x.y/1.png"}}]), ("assistant", "a")],
            "nothing is downloaded",
            id="address",
        ),
    ],
)
def test_malformed_messages_are_refused(chat, turns, problem):
    with pytest.raises(MLLMError, match=rf"rows\.jsonl, line 1: .*{problem}"):
        chat(*turns, images=["1.png"])


def test_image_urls_of_openais_schema_are_files_and_data_urls(chat, folder):
    encoded = base64.b64encode((folder / "2.png").read_bytes()).decode()
    urls = ["1.png", f"data:image/png;base64,{encoded}"]
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    item = chat(("user", [*parts, {"type": "text", "text": "q"}]), ("assistant", "a"))
    assert [image.key() for image in item.images] == [ImageFile(folder / f"{name}.png").key() for name in "12"]


IMAGE_PART = {"type": "image"}
AND = {"type": "text", "text": " and "}


@pytest.mark.parametrize(
    ("parts", "images", "order"),
    [
        pytest.param([IMAGE_PART, AND, IMAGE_PART], ["1.png", "2.png"], ["1.png", "2.png"], id="listed"),
        pytest.param([{**IMAGE_PART, "image": "2.png"}, AND, IMAGE_PART], ["1.png"], ["2.png", "1.png"], id="named"),
    ],
)
def test_images_among_the_parts_of_a_message_keep_their_order(chat, parts, images, order):
    item = chat(("user", parts), ("assistant", "a"), images=images)
    content = item.messages[0]["content"]
    assert [part["image"].path.name for part in content if part["type"] == "image"] == order
