"""Test the policy on rows: in every reader a bad row is named, or skipped and counted; missing images are dropped."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import logging
import lzma
import os
import random
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow
import pyarrow.parquet
import pytest

import mllm
from mllm.builtin import BUILT_IN
from mllm.config.data import DataSpec
from mllm.data import sources
from mllm.data.items import Item
from mllm.data.readers.captions import caption_folder, karpathy
from mllm.data.readers.matching import classes
from mllm.data.readers.questions import gqa, vqa
from mllm.data.readers.tables import table
from mllm.data.readers.tars import webdataset
from mllm.data.sources import fingerprint, read, read_all, read_source
from mllm.errors import MLLMError
from mllm.media.images import ImageFile
from mllm.planning.data_check import inspect
from mllm.testing import tiny_image

NAMES = ("a", "b", "c")


class Form(NamedTuple):
    """A file of a format with a row for each of the three images, and how one row is made bad."""

    write: Callable[[dict[str, Any]], str]  # name of an image -> its row
    row: Callable[[str], Any]
    bad: Callable[[Any], Any]  # a good row -> a bad one
    options: Mapping[str, Any] = {}  # reader's argument -> its value; FOLDER is the folder
    label: str = r"row 2"  # names the second row
    file: str = "path"  # the argument that names the file


def as_list(rows: dict[str, Any]) -> str:
    return json.dumps(list(rows.values()))


def as_lines(rows: dict[str, Any]) -> str:
    return "\n".join(map(json.dumps, rows.values()))


def under(key: str) -> Callable[[dict[str, Any]], str]:
    return lambda rows: json.dumps({key: list(rows.values())})


def with_value(key: str, value: Any) -> Callable[[Any], Any]:
    return lambda row: {**row, key: value}


def coco(rows: dict[str, Any]) -> str:
    images = [{"id": name, "file_name": f"{name}.jpg"} for name in rows]
    return json.dumps({"images": images, "annotations": list(rows.values())})


def asked(name: str) -> dict[str, Any]:
    return {"question_id": name, "image_id": name, "image": f"{name}.jpg", "question": "What?", "answers": ["x"]}


def turns(name: str) -> list[dict[str, str]]:
    return [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": name}]


IMAGES = {"images": "FOLDER"}
ANNOTATED: dict[str, Any] = {"file": "annotations", "options": IMAGES}
VIZWIZ = {"answers": [{"answer": "x"}]}
FORMS: dict[str, Form] = {
    "table": Form(
        as_lines, lambda n: {"image": f"{n}.jpg", "caption": n}, with_value("caption", True), IMAGES, "line 2"
    ),
    "coco-captions": Form(
        coco, lambda n: {"image_id": n, "caption": n}, with_value("caption", float("nan")), **ANNOTATED
    ),
    "karpathy": Form(
        under("images"),
        lambda n: {"filename": f"{n}.jpg", "split": "test", "sentences": [{"raw": n}]},
        with_value("sentences", [{"raw": " "}]),
        **ANNOTATED,
    ),
    "karpathy-retrieval": Form(
        under("images"),
        lambda n: {"filename": f"{n}.jpg", "split": "test", "sentences": [{"raw": n}]},
        with_value("sentences", []),
        file="annotations",
        options={**IMAGES, "find": "texts"},
    ),
    "textcaps": Form(
        under("data"),
        lambda n: {"image_id": n, "caption_str": n},
        with_value("caption_str", {"text": "x"}),
        **ANNOTATED,
    ),
    "caption-lines": Form(
        lambda rows: "\n".join(rows.values()), lambda n: f"{n}\t{n}.jpg", lambda row: f"{row}\tz", IMAGES, "line 2"
    ),
    "vizwiz": Form(as_list, lambda n: asked(n) | VIZWIZ, with_value("question", ""), **ANNOTATED),
    "aokvqa": Form(
        as_list,
        lambda n: asked(n) | {"image_id": NAMES.index(n), "direct_answers": ["x"]},
        with_value("direct_answers", [None, ""]),
        **ANNOTATED,
    ),
    "gqa": Form(
        json.dumps,
        lambda n: {"imageId": n, "question": "What?", "answer": n},
        with_value("answer", False),
        file="annotations",
        options=IMAGES,
        label="entry 'b'",
    ),
    "textvqa": Form(under("data"), asked, with_value("answers", ["", ""]), **ANNOTATED),
    "scienceqa": Form(
        json.dumps,
        lambda n: {"question": "What?", "choices": ["x", "y"], "answer": 1, "image": f"../../{n}.jpg", "split": "test"},
        with_value("answer", 2),
        file="problems",
        options=IMAGES,
        label="entry 'b'",
    ),
    "pope": Form(
        as_lines,
        lambda n: {"question_id": n, "image": f"{n}.jpg", "text": "Is it?", "label": "yes"},
        with_value("label", None),
        **ANNOTATED,
        label="line 2",
    ),
    "snli-ve": Form(
        as_lines,
        lambda n: {"Flickr30K_ID": n, "pairID": n, "sentence2": "It is.", "gold_label": "neutral"},
        with_value("gold_label", "-"),
        **ANNOTATED,
        label="line 2",
    ),
    "localized-narratives": Form(
        as_lines, lambda n: {"image_id": n, "caption": n}, with_value("caption", 7), IMAGES, "line 2"
    ),
    "visual-genome-regions": Form(
        as_list,
        lambda n: {"id": n, "regions": [{"region_id": 1, "phrase": n}, {"region_id": 2, "phrase": "x"}]},
        with_value("regions", []),
        **ANNOTATED,
    ),
    "wit": Form(
        lambda rows: "\n".join(["language\timage_url\tcaption_reference_description", *rows.values()]),
        lambda n: f"en\thttps://upload.wikimedia.org/1/1a/{n}.jpg\t{n}",
        lambda row: row.replace("https://upload.wikimedia.org/1/1a/b.jpg", " "),
        IMAGES,
    ),
    "hateful-memes": Form(
        as_lines,
        lambda n: {"id": n, "img": f"{n}.jpg", "text": n, "label": 1},
        with_value("label", 2),
        **ANNOTATED,
        label="line 2",
    ),
    "open-ended-mini-imagenet": Form(
        as_list,
        lambda n: {"question_image": f"{n}.jpg", "question": "What?", "answer": n},
        with_value("answer", []),
        **ANNOTATED,
    ),
    "llava": Form(
        as_list,
        lambda n: {"id": n, "image": f"{n}.jpg", "conversations": turns(n)},
        with_value("conversations", [{"from": "gpt", "value": "x"}]),
        IMAGES,
    ),
    "messages": Form(
        as_lines,
        lambda n: {
            "images": [f"{n}.jpg"],
            "messages": [{"role": "user", "content": "<image>q"}, {"role": "assistant", "content": n}],
        },
        with_value("images", []),
        IMAGES,
        "line 2",
    ),
    "mmc4": Form(
        as_lines,
        lambda n: {"text_list": [n], "image_info": [{"image_name": f"{n}.jpg", "matched_text_index": 0}]},
        with_value("text_list", [7]),
        IMAGES,
        "document 2",
    ),
    "obelics": Form(
        as_lines,
        lambda n: {"texts": [n, None], "images": [None, f"{n}.jpg"]},
        with_value("texts", [float("nan"), None]),
        IMAGES,
        "document 2",
    ),
}
DOCUMENTS = ("mmc4", "obelics")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of three images, under all names that the formats give them."""
    for number, name in enumerate(NAMES):
        for file in (f"{name}.jpg", f"{number:012d}.jpg"):
            tiny_image(number).save(tmp_path / file)
    return tmp_path


def source(format: str, folder: Path, *, bad: bool = False) -> DataSpec:
    """Return a source of three rows, of which the second may be bad."""
    form = FORMS[format]
    rows = {name: form.row(name) for name in NAMES}
    if bad:
        rows["b"] = form.bad(rows["b"])
    (folder / "rows.json").write_text(form.write(rows))
    options = {key: str(folder) if value == "FOLDER" else value for key, value in form.options.items()}
    if format == "table":
        (folder / "rows.json").rename(folder / "rows.jsonl")
    file = folder / ("rows.jsonl" if format == "table" else "rows.json")
    return DataSpec.model_validate({"format": format, form.file: str(file), **options})


@pytest.mark.parametrize("format", FORMS)
def test_a_bad_row_is_named_or_skipped_and_counted(format: str, folder: Path) -> None:
    whole = read_source(source(format, folder))
    assert len(whole.items) == 3 and not whole.report.left_out()
    spec = source(format, folder, bad=True)
    with pytest.raises(MLLMError, match=rf"rows\.jsonl?.*{FORMS[format].label}"):
        read(spec)
    part = read_source(spec, skip=0.5)
    assert len(part.items) == 2 and part.report.left_out()["bad rows"] == 1
    with pytest.raises(MLLMError, match=rf"(?s)1 of \d rows are bad, more than data.skip=0.1.*{FORMS[format].label}"):
        read_source(spec, skip=0.1)


@pytest.mark.parametrize("format", FORMS)
def test_missing_images_are_an_error_or_are_dropped_and_counted(format: str, folder: Path) -> None:
    spec = source(format, folder)
    for name in ("b.jpg", "000000000001.jpg"):
        (folder / name).unlink()
    with pytest.raises(MLLMError, match=r"1 of 3 images are missing: .*(b|1)\.jpg.*missing: drop"):
        read(spec)
    part = read_source(spec.model_copy(update={"missing": "drop"}))
    assert part.report.left_out()["missing images"] == 1
    assert len(part.items) == (3 if format in DOCUMENTS else 2)  # a document loses its image alone
    assert all(image.open() for item in part.items for image in item.images)
    with pytest.raises(MLLMError, match=r"missing is 'dorp'. Did you mean 'drop'"):
        read(spec.model_copy(update={"missing": "dorp"}))


def test_every_reader_has_the_policy() -> None:
    embedded = {"emoji-scenes", "emoji-motion", "emoji-retrieval", "easy-vqa"}
    apart = {"vqa", "caption-folder", "classes", "parquet", "saved-dataset", "webdataset", "decisions"}  # tested below
    others = {"winoground", "sugarcrepe", "vist", "visdial"}  # test sets, with several images or files
    videos = {"msvd-qa", "activitynet-qa", "next-qa", "video-mme", "mvbench"}  # in test_video_questions.py
    assert {*BUILT_IN["readers"]} == {*FORMS} | embedded | apart | others | videos


# Items of a format of one's own, and the data of a run.


def test_a_reader_without_rows_has_the_policy_on_images(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def plain(path: str) -> list[Any]:
        return [Item(n, (ImageFile(Path(path) / n),), ("x",)) for n in ("a.jpg", "z.jpg")]

    monkeypatch.setattr(sources, "lookup", lambda group, name: plain)
    spec = DataSpec.model_validate({"format": "plain", "path": str(folder)})
    with pytest.raises(MLLMError, match="1 of 2 images are missing"):
        read(spec)
    assert [item.id for item in read(spec.model_copy(update={"missing": "drop"}))] == ["a.jpg"]


def test_what_is_left_out_is_logged_recorded_and_checked(
    folder: Path, tiny_parts: tuple[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    rows: list[dict[str, Any]] = [{"image": f"{name}.jpg", "caption": f"a dog {name}"} for name in "abcab"]
    rows[3] = {"image": "a.jpg", "caption": ["", "x"]}
    text = "\n".join(map(json.dumps, [*rows, {"image": "z.jpg", "caption": "gone"}, {"image": "a.jpg"}]))
    (folder / "t.jsonl").write_text(text)
    recipe = folder / "tiny.yaml"
    recipe.write_text(f"""name: tiny
encoder: {{model: {tiny_parts[0]}}}
lm: {{model: {tiny_parts[1]}}}
connector: {{type: linear, tokens: 4}}
data: {{skip: 0.2, train: {{format: table, path: {folder}/t.jsonl, missing: drop}}}}
stages: [{{name: align, train: [connector], steps: 1, batch_size: 2}}]
""")
    counts = {"bad rows": 1, "missing images": 1, "empty texts": 1, "items with a missing image": 1}
    with caplog.at_level(logging.WARNING, "mllm"):
        run = mllm.train(str(recipe), out=folder / "run")
    assert json.loads((run.path / "data.json").read_text())["align"][0]["left_out"] == counts
    (line,) = {record.message for record in caplog.records if record.name == "mllm"}
    assert line.startswith(f"{folder}/t.jsonl: 1 bad rows left out: {folder}/t.jsonl, line 7: neither a 'caption'")
    assert "1 missing images left out" in line and "z.jpg" in line
    ((report,), _) = inspect(str(recipe))
    assert [problem for problem in report.problems if "1 of 7 rows are bad:" in problem] == report.problems != []
    notes = sorted(note.removeprefix("align: train 1, table: ").partition(" left out")[0] for note in report.notes)
    assert notes == ["1 empty texts", "1 items with a missing image", "1 missing images"]
    ((report,), _) = inspect(str(recipe), {"data.skip": 0.1})
    assert "more than data.skip=0.1 allows" in report.problems[0]
    with pytest.raises(MLLMError, match=r"1 of 7 rows are bad, more than data\.skip=0\.1 allows"):
        mllm.train(str(recipe), {"data.skip": 0.1}, out=folder / "again")


def test_items_without_an_answer_count_as_bad_rows_in_training(folder: Path) -> None:
    rows = {name: asked(name) | {"answers": ["x"] if name != "b" else []} for name in NAMES}
    (folder / "t.json").write_text(json.dumps({"data": list(rows.values())}))
    spec = DataSpec.model_validate({"format": "textvqa", "annotations": str(folder / "t.json"), "images": str(folder)})
    assert len(read(spec)) == 3  # a test split is read
    with pytest.raises(MLLMError, match="'b' has no answer"):
        read_all([spec])
    (kept,) = read_all([spec], skip=0.5)
    assert [item.id for item in kept.items] == ["a", "c"] and kept.report.bad == 1
    assert fingerprint([kept])[0]["left_out"] == {"bad rows": 1}


# Ids.


def test_one_id_for_two_items_is_refused_or_both_are_skipped(folder: Path) -> None:
    rows = [asked("a"), asked("b"), asked("c") | {"question_id": "a"}]
    (folder / "t.json").write_text(json.dumps({"data": rows}))
    spec = DataSpec.model_validate({"format": "textvqa", "annotations": str(folder / "t.json"), "images": str(folder)})
    with pytest.raises(MLLMError, match=r"t\.json: the id 'a' belongs to 2 items"):
        read(spec)
    assert [item.id for item in read_source(spec, skip=0.5).items] == ["b"]


def test_a_key_that_an_object_has_twice_is_refused(folder: Path) -> None:
    row = '{"imageId": "a", "question": "What?", "answer": "x"}'
    (folder / "g.json").write_text(f'{{"1": {row}, "1": {row}}}')
    with pytest.raises(MLLMError, match=r"g\.json is not JSON: an object has the key '1' twice"):
        gqa(annotations=str(folder / "g.json"), images=str(folder))


def test_a_bad_annotation_of_vqa_is_one_bad_row(folder: Path) -> None:
    questions = [{"question_id": n, "image_id": n, "question": "What?"} for n in NAMES]
    answers = [{"question_id": n, "answers": [{"answer": n}]} for n in NAMES]
    answers[1]["answers"] = [{"answer": True}]
    for name, content in (("q.json", {"questions": questions}), ("n.json", {"annotations": answers})):
        (folder / name).write_text(json.dumps(content))
    options = {"questions": str(folder / "q.json"), "annotations": str(folder / "n.json"), "images": str(folder)}
    spec = DataSpec.model_validate({"format": "vqa", "name": "{}.jpg", **options})
    with pytest.raises(MLLMError, match=r"n\.json, question_id b: the answer is True"):
        vqa(**spec.options())
    part = read_source(spec, skip=0.5)
    assert [item.answers for item in part.items] == [("a",), ("c",)] and part.report.bad == 1


@pytest.mark.parametrize("split", ["typo", ["test", "typo"]])
def test_an_unknown_split_is_refused(folder: Path, split: Any) -> None:
    spec = source("karpathy", folder)
    with pytest.raises(MLLMError, match=r"rows\.json has no split 'typo'. Known: test"):
        karpathy(**spec.options(), split=split)


# CSV and TSV, compared with Python's csv module in strict mode and with pandas.

WORDS = ["a dog", "two, three", 'say "b"', "one\nline", "tab\tbed", " blank ", "größer 你好", '"', "x,y\nz"]


def captions_of(path: Path, **options: Any) -> list[tuple[str, str]]:
    spec = DataSpec.model_validate({"format": "table", "path": str(path)})
    items = read_source(spec, **options).items
    return [(item.id, answer) for item in items for answer in item.answers]


@pytest.mark.parametrize(("suffix", "delimiter"), [("csv", ","), ("tsv", "\t")])
@pytest.mark.parametrize("writer", ["csv", "pandas"])
def test_tables_are_read_as_csv_and_pandas_read_them(folder: Path, suffix: str, delimiter: str, writer: str) -> None:
    pandas = pytest.importorskip("pandas")
    path = folder / f"t.{suffix}"
    rows = [(f"{NAMES[number % 3]}.jpg", f"{word} {number}") for number, word in enumerate(WORDS)]
    if writer == "csv":
        with path.open("w", newline="") as stream:
            csv.writer(stream, delimiter=delimiter).writerows([("image", "caption"), *rows])
    else:
        pandas.DataFrame(rows, columns=["image", "caption"]).to_csv(path, sep=delimiter, index=False)
    with path.open(newline="") as stream:
        expected = list(csv.reader(stream, delimiter=delimiter, strict=True))[1:]
    assert expected == pandas.read_csv(path, sep=delimiter).values.tolist()
    assert sorted(captions_of(path)) == sorted((name, caption.strip()) for name, caption in expected)


@pytest.mark.parametrize(("suffix", "delimiter"), [("csv", ","), ("tsv", "\t")])
@pytest.mark.parametrize("seed", range(20))
def test_an_unbalanced_quote_costs_its_own_row_only(folder: Path, suffix: str, delimiter: str, seed: int) -> None:
    draw = random.Random(seed)
    captions = [f"{draw.choice(WORDS)} {number}" for number in range(12)]
    damaged = draw.randrange(12)
    captions[damaged] = f"plain {damaged}"
    stream = io.StringIO()
    writer = csv.writer(stream, delimiter=delimiter, lineterminator="\n")
    writer.writerows([("image", "caption"), *((f"{draw.choice(NAMES)}.jpg", caption) for caption in captions)])
    place = draw.choice(("start", "end"))
    changed = f'"plain {damaged}' if place == "start" else f'"plain" {damaged}'
    text = stream.getvalue().replace(f"plain {damaged}", changed)
    (folder / f"t.{suffix}").write_text(text)
    expected = sorted(caption.strip() for caption in captions if caption != captions[damaged])
    assert sorted(caption for _, caption in captions_of(folder / f"t.{suffix}", skip=0.5)) == expected
    with pytest.raises(MLLMError, match=rf"t\.{suffix}, row {damaged + 1}: "):
        table(path=str(folder / f"t.{suffix}"))


@pytest.mark.parametrize("end", ['the end"', 'the "end"', "the end"])
def test_a_quote_that_opens_a_field_does_not_swallow_rows(folder: Path, end: str) -> None:
    (folder / "t.tsv").write_text(f'image\tcaption\na.jpg\t"a dog\nb.jpg\ta cat\nc.jpg\t{end}\n')
    with pytest.raises(MLLMError, match=r"t\.tsv, row 1: .*line 2"):
        table(path=str(folder / "t.tsv"))
    assert captions_of(folder / "t.tsv", skip=0.5) == [("b.jpg", "a cat"), ("c.jpg", end)]


def test_rows_of_empty_fields_are_no_rows(folder: Path) -> None:
    (folder / "t.csv").write_text("image,caption,\na.jpg,x,\n,,\n,,\n")
    assert captions_of(folder / "t.csv") == [("a.jpg", "x")]


def test_a_row_may_list_images(folder: Path) -> None:
    (folder / "t.json").write_text(json.dumps([{"image": ["a.jpg", "b.jpg"], "question": "Same?", "answer": "no"}]))
    (item,) = table(path=str(folder / "t.json"))
    assert item.images == (ImageFile(folder / "a.jpg"), ImageFile(folder / "b.jpg")) and item.answers == ("no",)


# Files that are damaged, compressed, or no files.


@pytest.mark.parametrize(("suffix", "compress"), [("gz", gzip.compress), ("bz2", bz2.compress), ("xz", lzma.compress)])
@pytest.mark.parametrize("name", ["t.csv", "t.tsv", "t.json", "t.jsonl"])
def test_compressed_files_are_read_as_uncompressed(folder: Path, name: str, suffix: str, compress: Any) -> None:
    texts = {"t.csv": "image,caption\na.jpg,x\n", "t.tsv": "image\tcaption\na.jpg\tx\n"}
    row = '{"image": "a.jpg", "caption": "x"}'
    data = {"t.json": f"[{row}]", "t.jsonl": f"{row}\n", **texts}[name].encode()
    (folder / name).write_bytes(data)
    (folder / f"{name}.{suffix}").write_bytes(compress(data))
    assert table(path=str(folder / f"{name}.{suffix}")) == table(path=str(folder / name))


@pytest.mark.parametrize("name", ["t.csv.zst", "t.jsonl.zip", "t.json.7z"])
def test_other_compressed_files_are_refused_by_name(folder: Path, name: str) -> None:
    (folder / name).write_bytes(b"x")
    with pytest.raises(MLLMError, match=name.replace(".", r"\.")):
        table(path=str(folder / name))


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    "format", ["table", "llava", "coco-captions", "mmc4", "caption-lines", "parquet", "webdataset"]
)
def test_pipes_devices_and_folders_are_no_files(format: str, folder: Path) -> None:
    os.mkfifo(folder / "t.jsonl")
    (folder / "folder.jsonl").mkdir()
    key = "annotations" if format == "coco-captions" else "path"
    options = {} if format in ("parquet", "webdataset") else IMAGES
    for name in (folder / "t.jsonl", Path("/dev/zero"), folder / ("x" * 300 + ".jsonl")):
        if format == "table" and name.suffix != ".jsonl":
            continue
        with pytest.raises(MLLMError, match=r"cannot be read: (it is no regular|no such) file|missing tars"):
            read(DataSpec.model_validate({"format": format, key: str(name), **options}))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[" * 100_000, "is nested too deeply"),
        ("", "is not JSON: it is empty"),
        ('[{"image": "a.jpg"', "is not JSON"),
        ("9" * 5000, "is not JSON"),
        ('"text"', "is no list of rows"),
    ],
)
def test_json_that_cannot_be_read_is_named(folder: Path, content: str, message: str) -> None:
    (folder / "t.json").write_text(content)
    with pytest.raises(MLLMError, match=rf"t\.json.*{message}"):
        table(path=str(folder / "t.json"))


def test_a_damaged_line_of_json_lines_is_a_bad_row(folder: Path) -> None:
    row = '{"image": "a.jpg", "caption": "x"}'
    (folder / "t.jsonl").write_text("\n".join([row, "[" * 100_000, row[:20], row]))
    with pytest.raises(MLLMError, match=r"t\.jsonl, line 2: .*nested too deeply"):
        table(path=str(folder / "t.jsonl"))
    assert captions_of(folder / "t.jsonl", skip=0.5) == [("a.jpg", "x")] * 2


# Hidden files and tars.


def test_hidden_files_and_folders_are_left_out(folder: Path) -> None:
    for name in (".ipynb_checkpoints", "__MACOSX", "cats", ".git"):
        (folder / name).mkdir()
        tiny_image(0).save(folder / name / "a.jpg")
        (folder / name / "a.txt").write_text("a cat")
    tiny_image(0).save(folder / "cats" / "._a.jpg")
    for path in folder.glob("*.jpg"):
        path.unlink()
    assert [item.id for item in caption_folder(path=str(folder))] == ["cats/a.jpg"]
    assert [item.id for item in classes(path=str(folder))] == ["cats/a.jpg"]


def pack(path: Path, *members: tuple[str, bytes], encoding: str = "utf-8") -> Path:
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT, encoding=encoding) as archive:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


@pytest.fixture
def samples(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, bytes]]:
    """The members of a tar with three samples; the cache is in the test's folder."""
    monkeypatch.setenv("MLLM_CACHE", str(folder / "cache"))
    return [
        member
        for name in NAMES
        for member in ((f"{name}.jpg", (folder / f"{name}.jpg").read_bytes()), (f"{name}.txt", name.encode()))
    ]


def test_members_of_one_name_are_refused_or_their_sample_is_skipped(folder: Path, samples: Any) -> None:
    path = pack(folder / "t.tar", *samples, ("b.txt", b"another"))
    with pytest.raises(MLLMError, match=r"t\.tar, b: two members have one name"):
        webdataset(path=str(path))
    part = read_source(DataSpec.model_validate({"format": "webdataset", "path": str(path)}), skip=0.5)
    assert [item.answers for item in part.items] == [("a",), ("c",)]
    assert part.report.left_out() == {"bad rows": 1} and part.report.rows == 3


@pytest.mark.parametrize(("suffix", "compress"), [("gz", gzip.compress), ("bz2", bz2.compress), ("xz", lzma.compress)])
def test_a_compressed_tar_is_read_as_uncompressed(folder: Path, samples: Any, suffix: str, compress: Any) -> None:
    path = pack(folder / "t.tar", *samples)
    (folder / f"t.tar.{suffix}").write_bytes(compress(path.read_bytes()))
    whole, packed = webdataset(path=str(path)), webdataset(path=f"{path}.{suffix}")
    assert [(i.id, i.answers, i.images[0].key()) for i in packed] == [
        (i.id, i.answers, i.images[0].key()) for i in whole
    ]
    assert packed.fingerprint() == whole.fingerprint()
    (folder / "cut").mkdir()
    (folder / "cut" / f"t.tar.{suffix}").write_bytes(compress(path.read_bytes())[:-20])
    with pytest.raises(MLLMError, match=rf"t\.tar\.{suffix} cannot be decompressed"):
        webdataset(path=str(folder / "cut"))


def test_a_member_whose_name_is_latin_1_is_read(folder: Path, samples: Any) -> None:
    path = pack(folder / "t.tar", ("ü.jpg", samples[0][1]), ("ü.txt", b"x"), encoding="latin-1")
    (item,) = webdataset(path=str(path))
    assert item.answers == ("x",) and item.id == "t/\\xfc" and item.images[0].open().size == tiny_image(0).size


@pytest.mark.parametrize("damage", [lambda data: b"", lambda data: data[:-30], lambda data: b"\0" * len(data)])
def test_a_damaged_index_in_the_cache_is_made_again(folder: Path, samples: Any, damage: Any) -> None:
    path = pack(folder / "t.tar", *samples)
    before = list(webdataset(path=str(path)))
    (cached,) = (folder / "cache" / "tars").glob("*.npz")
    good = cached.read_bytes()
    cached.write_bytes(damage(good))
    assert list(webdataset(path=str(path))) == before
    assert cached.read_bytes() != damage(good)


def test_a_saved_data_set_with_an_id_twice(folder: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = {"image": [{"bytes": b"x", "path": None}] * 3, "caption": ["x", "y", "z"], "n": [1, 2, 1]}
    datasets.Dataset.from_dict(rows).save_to_disk(folder / "saved")
    options = {"path": str(folder / "saved"), "answers": "caption", "id": "n"}
    spec = DataSpec.model_validate({"format": "saved-dataset", **options})
    with pytest.raises(MLLMError, match="the id '1' belongs to 2 rows"):
        read(spec)
    part = read_source(spec, skip=0.5)
    assert [item.answers for item in part.items] == [("y",)] and part.report.left_out() == {"bad rows": 1}


def test_a_bad_row_of_parquet_is_named_or_skipped(folder: Path) -> None:
    image = [(folder / "a.jpg").read_bytes()] * 3
    columns = {"image": image, "caption": ["x", None, "z"], "flag": [True, False, True]}
    pyarrow.parquet.write_table(pyarrow.table(columns), folder / "t.parquet")
    spec = DataSpec.model_validate({"format": "parquet", "path": str(folder / "t.parquet"), "answers": "caption"})
    with pytest.raises(MLLMError, match="'1' has no answer"):
        read_all([spec])
    assert [item.answers for item in read_all([spec], skip=0.5)[0].items] == [("x",), ("z",)]
    with pytest.raises(MLLMError, match=r"t\.parquet, row 0: the caption is True"):
        read(spec.model_copy(update={"answers": "flag"}))


def test_a_bad_decision_is_named_or_skipped(folder: Path) -> None:
    rows = [{"prompt": "a dog", "label": "retrieve"}, {"prompt": "a cat", "label": "draw"}]
    (folder / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    spec = DataSpec.model_validate({"format": "decisions", "path": str(folder / "t.jsonl")})
    with pytest.raises(MLLMError, match=r"t\.jsonl, line 2: the label is 'draw'"):
        read(spec)
    assert [item.answers for item in read_source(spec, skip=0.5).items] == [("retrieve",)]
