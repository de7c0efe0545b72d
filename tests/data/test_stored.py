"""Test large annotation files, whose rows stay in the file: the items of `json.load`, its errors, the same policy."""

from __future__ import annotations

import itertools
import json
import os
import random
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mllm.config.data import DataSpec
from mllm.config.prompt import PromptSpec
from mllm.data import scanning, stored
from mllm.data.files import entries_of, records_of, rows_of
from mllm.data.lazy import Lazy
from mllm.data.notes import sizes_of
from mllm.data.sources import Source, fingerprint, read_all, read_source
from mllm.data.stream import Stream
from mllm.errors import MLLMError
from mllm.planning.data_check import inspect
from tests.data.test_reading import FORMS, folder, source  # noqa: F401
from tests.fuzz.data import Data
from tests.fuzz.harness import judge

UNSTORED = ("karpathy-retrieval", "wit")  # all images are every item's candidates; a TSV file is held in memory


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file is a large one, in blocks that end within rows, characters and numbers."""
    monkeypatch.setattr(stored, "HELD", 0)
    monkeypatch.setattr(scanning, "BLOCK", 7)


@pytest.fixture
def both(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Source, Source]]:
    """Read a source held in memory, and as one of a large file."""

    def read(spec: DataSpec, **options: Any) -> tuple[Source, Source]:
        held = read_source(spec, **options)
        with monkeypatch.context() as patch:
            patch.setattr(stored, "HELD", 0)
            patch.setattr(scanning, "BLOCK", 7)
            drawn = read_source(spec, **options)
        assert isinstance(held.items, list) and isinstance(drawn.items, Lazy)
        return held, drawn

    return read


TEXTS = {
    "list": '[{"a": [1, {"é": null}]}, "\\u00e9\\ud83d\\ude00 \\"b\\"", -12.5e3,\r\n [], {}, {"日本": "語]}"}, 7 ]\n',
    "bare": "[1,22,333]",
    "empty": " [ ] ",
}


@pytest.mark.parametrize("bom", ["", "\ufeff"])
@pytest.mark.parametrize("name", TEXTS)
def test_rows_are_those_of_json_load(name: str, bom: str, tmp_path: Path, large: None) -> None:
    file = tmp_path / "rows.json"
    file.write_bytes((bom + TEXTS[name]).encode())
    expected = json.loads(TEXTS[name])
    rows = rows_of(file, "rows")
    assert [record.load() for record in rows] == expected and rows.stored
    for index in random.Random(0).sample(range(len(expected)), len(expected)):
        assert rows.at(index).load() == expected[index] and rows.at(index).number == index + 1
        assert rows.at(index).label == f"{file}, row {index + 1}"


def test_entries_and_rows_under_a_key_are_those_of_json_load(tmp_path: Path, large: None) -> None:
    content = {"info": {"é": [1]}, "images": [{"id": 1}, "ü"], "empty": [], "annotations": [[2, 3], {"x": {}}], "n": 5}
    file = tmp_path / "rows.json"
    file.write_text(json.dumps(content, ensure_ascii=False, indent=1))
    for key in ("images", "annotations", "empty"):
        rows = rows_of(file, "rows", key)
        assert [record.load() for record in rows] == content[key] == [record.load() for record in rows]
    entries = entries_of(file, "entries")
    assert [record.load() for record in entries] == list(content.items())
    assert entries.at(1).load() == ("images", content["images"]) and entries.at(1).label == f"{file}, entry 'images'"
    with pytest.raises(MLLMError, match="it is no list of rows; expected rows"):
        list(rows_of(file, "rows", "info"))
    with pytest.raises(MLLMError, match="it is no list of rows; expected rows"):
        list(rows_of(file, "rows", "other"))
    with pytest.raises(MLLMError, match="it is no list of rows; expected rows"):
        list(rows_of(file, "rows"))


def test_lines_are_those_of_the_text(tmp_path: Path, large: None) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes('\ufeff{"a": "é"}\r\n\n  \n[1]\r"\u2028"\n\r\n7'.encode())
    rows = records_of(file)
    assert [(record.label, record.number, record.load()) for record in rows] == [
        (f"{file}, line {line}", number, value)
        for number, (line, value) in enumerate([(1, {"a": "é"}), (4, [1]), (5, "\u2028"), (7, 7)], start=1)
    ]
    assert [rows.at(index).load() for index in (3, 0, 2, 1)] == [7, {"a": "é"}, "\u2028", [1]]


def error_of(act: Callable[[], Any]) -> str:
    try:
        act()
    except (MLLMError, ValueError) as error:
        return str(error)
    return ""


def test_damage_has_the_message_of_one_parse_of_the_whole_text(tmp_path: Path, large: None) -> None:
    file = tmp_path / "rows.json"
    text = '[{"é": "x\\n", "b": [1, -2.5]},\n\n  {"c": "日本"}, null, 34]\n'
    damaged = [text[:cut] for cut in range(2, len(text) - 2)]
    damaged += [text[:at] + sign + text[at:] for at in range(2, len(text)) for sign in ",}]x"]
    compared = 0
    for broken in damaged:
        expected = error_of(lambda broken=broken: json.loads(broken))  # type: ignore[misc]
        file.write_text(broken)
        message = error_of(lambda: list(rows_of(file, "rows")))
        assert message == (f"{file} is not JSON: {expected}. Is the file complete?" if expected else ""), broken
        compared += bool(expected)
    assert compared > 200


def test_bytes_that_are_not_utf8_keys_that_are_twice_and_depth_are_refused(tmp_path: Path, large: None) -> None:
    file = tmp_path / "rows.json"
    for data, reason in (
        (b'[{"a": "x"},\n\n "caf\xe9"]', "line 3 has a byte 0xe9 that is not UTF-8"),
        (b'[{"a": 1, "b": 2, "a": 3}]', "an object has the key 'a' twice"),
        (b"[" * 100_000, "nested too deeply"),
        ('["x"]'.encode("utf-16"), "it is UTF-16 or UTF-32"),
    ):
        file.write_bytes(data)
        with pytest.raises(MLLMError, match=reason):
            list(rows_of(file, "rows"))
    file.write_text('{"images": [], "images": [1]}')
    with pytest.raises(MLLMError, match="an object has the key 'images' twice"):
        list(rows_of(file, "rows", "images"))


@pytest.mark.parametrize("format", [name for name in FORMS if name not in UNSTORED])
def test_the_policy_is_the_same_in_every_format(
    format: str,
    folder: Path,  # noqa: F811
    both: Callable[..., tuple[Source, Source]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for bad, gone in itertools.product((False, True), repeat=2):
        spec = source(format, folder, bad=bad).model_copy(update={"missing": "drop"})
        for name in ("c.jpg", "000000000002.jpg") if gone else ():
            (folder / name).rename(folder / f"{name}.away")
        held, drawn = both(spec, skip=0.5)
        assert list(drawn.items) == held.items and drawn.report == held.report
        assert [drawn.items[index] for index in reversed(range(len(held.items)))] == held.items[::-1]
        assert drawn.report == held.report  # what is drawn is not counted again
        for file in folder.glob("*.away"):
            file.rename(file.with_suffix(""))
    source(format, folder, bad=True)
    errors = [error_of(lambda: read_source(spec))]
    monkeypatch.setattr(stored, "HELD", 0)
    errors.append(error_of(lambda: read_source(spec)))
    assert errors[0] == errors[1] != ""


def write(folder: Path, rows: list[Any], name: str = "rows.json") -> DataSpec:  # noqa: F811
    (folder / name).write_text(json.dumps(rows))
    return DataSpec.model_validate({"format": "llava", "path": str(folder / name), "images": str(folder)})


def talk(number: int, **more: Any) -> dict[str, Any]:
    turns = [{"from": "human", "value": f"What is {number}?"}, {"from": "gpt", "value": f"<b>é {number}</b>"}]
    return {"id": number, "image": "abc"[number % 3] + ".jpg", "conversations": turns, **more}


def test_training_draws_the_same_in_the_same_order(
    folder: Path,  # noqa: F811
    both: Callable[..., tuple[Source, Source]],
) -> None:
    rows = [talk(number) for number in range(40)]
    rows[7]["conversations"] = []
    for fraction in (1.0, 0.5):
        spec = write(folder, rows).model_copy(update={"fraction": fraction})
        held, drawn = (Stream([one], PromptSpec(), seed=3) for one in both(spec, skip=0.1))
        assert [held.take(8) for _ in range(12)] == [drawn.take(8) for _ in range(12)]


def test_several_files_and_several_rows_an_item(
    folder: Path,  # noqa: F811
    both: Callable[..., tuple[Source, Source]],
) -> None:
    (folder / "pope").mkdir()
    for kind in ("popular", "random"):
        rows = [{"question_id": n, "image": f"{n}.jpg", "text": f"{kind}?", "label": "yes"} for n in "abc"]
        (folder / "pope" / f"coco_{kind}.json").write_text("\n".join(map(json.dumps, rows)))
    (folder / "captions.tsv").write_text("one\ta.jpg\ntwo\tb.jpg\nthree\ta.jpg\n \tb.jpg\n")
    (folder / "many.jsonl").write_text("\n".join(
        json.dumps({"image": image, "caption": caption})
        for image, caption in (("a.jpg", ["x", ""]), (["a.jpg", "b.jpg"], "z"), ("b.jpg", "y"), ("a.jpg", "w"))
    ))  # fmt: skip
    for options in (
        {"format": "pope", "annotations": str(folder / "pope"), "images": str(folder)},
        {"format": "caption-lines", "path": str(folder / "captions.tsv"), "images": str(folder)},
        {"format": "table", "path": str(folder / "many.jsonl")},
    ):
        held, drawn = both(DataSpec.model_validate(options), skip=0.5)
        assert list(drawn.items) == held.items and len(held.items) > 1 and drawn.report == held.report
    assert held.items[0].answers == ("x", "w") and held.report.counts == {"empty texts": 1}


def test_questions_and_answers_in_two_files(
    folder: Path,  # noqa: F811
    both: Callable[..., tuple[Source, Source]],
) -> None:
    questions = [{"question_id": n, "image_id": n, "question": f"{n}?"} for n in "abcc"]
    labels = [{"question_id": n, "answers": [{"answer": n}], "answer_type": "other"} for n in "bac"]
    (folder / "q.json").write_text(json.dumps({"questions": questions}))
    (folder / "n.json").write_text(json.dumps({"annotations": labels}))
    options = {"format": "vqa", "questions": str(folder / "q.json"), "images": str(folder), "name": "{}.jpg"}
    for more in ({}, {"annotations": str(folder / "n.json")}):
        held, drawn = both(DataSpec.model_validate({**options, **more}), skip=0.5)
        assert list(drawn.items) == held.items and drawn.report == held.report
        assert [item.question for item in drawn.items] == ["a?", "b?"]


def test_every_reader_of_files_agrees_with_a_plain_reading(
    tmp_path: Path, large: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scanning, "BLOCK", 50)
    fuzzer = Data(tmp_path)  # reads every format, and compares it with `tests.fuzz.plain`
    chance = random.Random("stored")
    named = [each for each in fuzzer.named().items() if not each[0].startswith("tar")]
    outcomes = {label: judge(act) for label, act in chance.sample(named, 120)}
    outcomes |= {label: judge(act) for label, act in (fuzzer.draw(random.Random(n)) for n in range(60))}
    assert {label: outcome for label, outcome in outcomes.items() if outcome not in ("right", "refused")} == {}


def test_a_file_that_changes_after_it_was_read_is_not_drawn_from(folder: Path, large: None) -> None:  # noqa: F811
    spec = write(folder, [talk(number) for number in range(3)])
    (read,) = read_all([spec])
    assert isinstance(read.items, Lazy)
    assert read.items[2].id == "2" and read.items.images == 3
    write(folder, [talk(number) for number in range(4)])
    with pytest.raises(MLLMError, match=r"rows\.json was changed since it was read"):
        read.items[2]


def test_a_fingerprint_is_of_rows_options_and_images(folder: Path, large: None) -> None:  # noqa: F811
    def hash_of(spec: DataSpec) -> str:
        return str(fingerprint([read_source(spec, skip=0.5)])[0]["sha256"])

    spec = write(folder, [talk(number) for number in range(3)])
    first = hash_of(spec)
    assert hash_of(write(folder, [talk(number) for number in range(3)], "other.json")) == first
    assert hash_of(spec.model_copy(update={"task": "captions"})) != first
    assert hash_of(spec.model_copy(update={"fraction": 0.5})) != first
    assert hash_of(write(folder, [talk(number) for number in (0, 2, 1)])) != first
    spec = write(folder, [talk(number) for number in range(3)])
    with (folder / "b.jpg").open("ab") as image:
        image.write(b"\0")
    assert hash_of(spec) != first


def test_shots_are_refused_for_conversations_before_training(folder: Path, large: None) -> None:  # noqa: F811
    spec = write(folder, [talk(number) for number in range(3)]).model_copy(update={"shots": 1})
    with pytest.raises(MLLMError, match="is a conversation or a document, but shots"):
        read_all([spec])


def test_reading_takes_little_memory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    spec = write(folder, [talk(number, note="x" * 1500) for number in range(2000)])  # 3 MB
    monkeypatch.setattr(stored, "HELD", 2**20)
    monkeypatch.setattr(scanning, "BLOCK", 2**16)
    tracemalloc.start()
    try:
        items = read_source(spec).items
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(items) == 2000 and peak < 1.2 * 2**20


def test_files_are_looked_for_in_threads_as_one_by_one(tmp_path: Path) -> None:
    names = [str(tmp_path / f"{number}") for number in range(2500)]
    for number, name in enumerate(names):
        if number % 3:
            Path(name).write_bytes(b"x" * (number % 7))
    os.mkfifo(names[0])
    os.mkdir(names[3])
    expected = [os.path.getsize(name) if os.path.isfile(name) else None for name in names]
    assert sizes_of(names) == expected and sizes_of([*names[:5], "\0", "x" * 5000]) == [*expected[:5], None, None]


def test_data_check_lists_the_bad_rows_of_a_large_file(
    folder: Path,  # noqa: F811
    tiny_parts: tuple[str, str],
    large: None,
) -> None:
    rows = [talk(number) for number in range(6)]
    rows[1]["conversations"] = rows[4]["conversations"] = [{"from": "gpt", "value": "x"}]
    spec = write(folder, rows)
    recipe = folder / "tiny.yaml"
    recipe.write_text(f"""name: tiny
encoder: {{model: {tiny_parts[0]}}}
lm: {{model: {tiny_parts[1]}}}
connector: {{type: linear, tokens: 4}}
data: {{skip: 0.5, train: {{format: llava, path: {spec.options()["path"]}, images: {folder}}}}}
stages: [{{name: align, train: [connector], steps: 1, batch_size: 2}}]
""")
    ((report,), _) = inspect(str(recipe))
    assert report.items == 4 and "2 of 6 rows are bad:" in report.problems[0]
    assert "row 2: there is no turn of the user" in report.problems[0] and "row 5" in report.problems[0]
