"""Fuzz data files of every reader: damaged bytes and values, compared row by row with a second, plain reading."""

from __future__ import annotations

import contextlib
import functools
import gzip
import io
import json
import os
import random
import shutil
import tarfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import torch

from mllm.config.data import DataSpec
from mllm.data.items import Item
from mllm.data.sources import fingerprint, read_source
from mllm.errors import MLLMError
from mllm.media.images import ImageFile
from mllm.testing import tiny_image
from tests.fuzz import plain
from tests.fuzz.harness import Act
from tests.fuzz.mutate import changed, damaged

datasets.disable_progress_bars()
IMAGES = [f"{number}.jpg" for number in range(4)] + [f"{number:012d}.jpg" for number in range(4)]
IMAGES += [f"{number:04d}.jpg" for number in range(4)] + [f"{number}.png" for number in range(4)]


@dataclass(frozen=True)
class Format:
    """A format: its files by their contents, its reader's options, and the plain reading.

    Attributes:
        files: texts, or values that are written as JSON, or as JSON lines.
        options: of the reader; ``FOLDER/`` stands for the folder of the files.
        rows: the plain reading.
    """

    files: dict[str, Any]
    options: dict[str, Any]
    rows: Callable[[Path], list[plain.Row]]
    json: bool = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "json", not any(isinstance(content, str) for content in self.files.values()))


def _answers(*texts: str) -> list[dict[str, str]]:
    return [{"answer": text} for text in texts]


TALK = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat."}]
SAID = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Hi"}]},
        {"role": "assistant", "content": "A dog."}]  # fmt: skip
COCO = {
    "images": [{"id": number, "file_name": f"{number}.jpg"} for number in range(3)],
    "annotations": [{"image_id": number % 3, "caption": f"caption {number}"} for number in range(5)],
}
ROWS: list[dict[str, Any]] = [{"image": f"{number}.jpg", "caption": f"a {number}, and more"} for number in range(3)]
ROWS += [{"image": ["0.jpg", "1.jpg"], "question": "which?", "answer": [3, "x"]}]
CSV = 'image,caption\n0.jpg,one\n1.jpg,"say ""b"", or, c"\n0.jpg,"two\nlines"\n2.jpg,three\n'
VISDIAL = {
    "split": "val2018",
    "data": {
        "questions": ["is it red", "where"],
        "answers": ["yes", "no", "in a park"],
        "dialogs": [
            {"image_id": number, "dialog": [
                {"question": 0, "answer": 0, "answer_options": [1, 0, 2], "gt_index": 1},
                {"question": 1, "answer": 2, "answer_options": [2, 1, 0], "gt_index": 0},
            ]} for number in range(2)
        ],
    },
}  # fmt: skip
STORIES = [
    [{"story_id": story, "photo_flickr_id": photo, "worker_arranged_photo_order": order, "text": f"{story} {order}"}]
    for story in ("7", "8")
    for order, photo in enumerate("012")
]
FORMATS: dict[str, Format] = {
    "coco-captions": Format(
        {"coco.json": COCO}, {"annotations": "FOLDER/coco.json", "images": "FOLDER/images"}, plain.coco,
    ),
    "karpathy": Format(
        {"karpathy.json": {"images": [{"filename": f"{n}.jpg", "cocoid": n, "split": "test" if n else "train",
                                       "sentences": [{"raw": f"a {n}"}, {"raw": "b"}]} for n in range(4)]}},
        {"annotations": "FOLDER/karpathy.json", "images": "FOLDER/images"}, plain.karpathy,
    ),
    "textcaps": Format(
        {"textcaps.json": {"data": [{"image_id": str(n % 3), "caption_str": f"a {n}"} for n in range(4)]}},
        {"annotations": "FOLDER/textcaps.json", "images": "FOLDER/images"}, plain.textcaps,
    ),
    "caption-lines": Format(
        {"lines.tsv": 'one\t0.jpg\ntwo "x"\t1.jpg\nthree\t0.jpg\n'},
        {"path": "FOLDER/lines.tsv", "images": "FOLDER/images"}, plain.caption_lines,
    ),
    "vqa": Format(
        {"questions.json": {"questions": [{"question_id": n, "image_id": n, "question": f"q {n}"} for n in range(3)]},
         "annotations.json": {"annotations": [{"question_id": n, "answers": _answers("a", str(n))} for n in range(3)]}},
        {"questions": "FOLDER/questions.json", "annotations": "FOLDER/annotations.json", "images": "FOLDER/images",
         "name": "{:04d}.jpg"}, plain.vqa,
    ),
    "vizwiz": Format(
        {"vizwiz.json": [{"image": f"{n}.jpg", "question": f"q {n}", "answers": _answers("a", "b")} for n in range(3)]},
        {"annotations": "FOLDER/vizwiz.json", "images": "FOLDER/images"}, plain.vizwiz,
    ),
    "aokvqa": Format(
        {"aokvqa.json": [{"question_id": f"q{n}", "image_id": n, "question": "Why?", "choices": ["a", "b"],
                          "correct_choice_idx": 1, "direct_answers": ["sun", "heat"]} for n in range(3)]},
        {"annotations": "FOLDER/aokvqa.json", "images": "FOLDER/images"}, plain.aokvqa,
    ),
    "gqa": Format(
        {"gqa.json": {str(n): {"imageId": n, "question": "Red?", "answer": "no", "types": {"structural": "verify"}}
                      for n in range(3)}},
        {"annotations": "FOLDER/gqa.json", "images": "FOLDER/images"}, plain.gqa,
    ),
    "textvqa": Format(
        {"textvqa.json": {"data": [{"question_id": n, "image_id": n, "question": "?", "answers": ["a"] * 3}
                                   for n in range(3)]}},
        {"annotations": "FOLDER/textvqa.json", "images": "FOLDER/images"}, plain.textvqa,
    ),
    "scienceqa": Format(
        {"problems.json": {str(n): {"question": "Which?", "hint": "Look.", "choices": ["x", "y"], "answer": 1,
                                    "image": "image.png", "split": "test"} for n in range(2)}},
        {"problems": "FOLDER/problems.json", "images": "FOLDER/images"}, plain.scienceqa,
    ),
    "pope": Format(
        {"pope.json": [{"question_id": n, "image": f"{n}.jpg", "text": "A cat?", "label": "yes"} for n in range(3)]},
        {"annotations": "FOLDER/pope.json", "images": "FOLDER/images"}, plain.pope,
    ),
    "snli-ve": Format(
        {"snli.jsonl": [{"Flickr30K_ID": n, "pairID": f"{n}#0", "sentence2": "A man.", "gold_label": "neutral"}
                        for n in range(3)]},
        {"annotations": "FOLDER/snli.jsonl", "images": "FOLDER/images"}, plain.snli_ve,
    ),
    "winoground": Format(
        {"winoground.jsonl": [{"id": n, "image_0": f"{n}", "image_1": "3", "caption_0": "a b", "caption_1": "b a"}
                              for n in range(3)]},
        {"annotations": "FOLDER/winoground.jsonl", "images": "FOLDER/images"}, plain.winoground,
    ),
    "decisions": Format(
        {"decisions.jsonl": [{"prompt": f"p {n}", "label": label} for n, label in enumerate(("retrieve", "generate"))]},
        {"path": "FOLDER/decisions.jsonl"}, plain.decisions,
    ),
    "open-ended-mini-imagenet": Format(
        {"mini.json": [{"image_1": "1.jpg", "caption_1": "a dax", "question_image": "0.jpg", "question": "What?",
                        "answer": "dax"}] * 2},
        {"annotations": "FOLDER/mini.json", "images": "FOLDER/images"}, plain.mini_imagenet,
    ),
    "llava": Format(
        {"llava.json": [{"id": n, "image": f"{n}.jpg", "conversations": TALK} for n in range(3)]},
        {"path": "FOLDER/llava.json", "images": "FOLDER/images"},
        plain.counted(lambda folder: plain.lines_of(folder / "llava.json")),
    ),
    "messages": Format(
        {"messages.jsonl": [{"messages": SAID, "images": [f"{n}.jpg"]} for n in range(3)]},
        {"path": "FOLDER/messages.jsonl", "images": "FOLDER/images"},
        plain.counted(lambda folder: plain.lines_of(folder / "messages.jsonl")),
    ),
    "mmc4": Format(
        {"mmc4.jsonl": [{"text_list": ["a", "b"], "image_info": [{"image_name": f"{n}.jpg", "matched_text_index": 1,
                                                                  "matched_sim": 0.5}]} for n in range(2)]},
        {"path": "FOLDER/mmc4.jsonl", "images": "FOLDER/images"},
        plain.counted(lambda folder: plain.lines_of(folder / "mmc4.jsonl")),
    ),
    "obelics": Format(
        {"obelics.jsonl": [{"texts": ["a", None, "b"], "images": [None, f"{n}.jpg", None]} for n in range(2)]},
        {"path": "FOLDER/obelics.jsonl", "images": "FOLDER/images"},
        plain.counted(lambda folder: plain.lines_of(folder / "obelics.jsonl")),
    ),
    "table json": Format(
        {"table.json": ROWS}, {"path": "FOLDER/table.json", "images": "FOLDER/images"},
        lambda folder: plain.table(plain.parsed(plain.text_of(folder / "table.json"))),
    ),
    "table jsonl": Format(
        {"table.jsonl": ROWS}, {"path": "FOLDER/table.jsonl", "images": "FOLDER/images"},
        lambda folder: plain.table(plain.lines_of(folder / "table.jsonl")),
    ),
    "table csv": Format(
        {"table.csv": CSV}, {"path": "FOLDER/table.csv", "images": "FOLDER/images"},
        lambda folder: plain.table(plain.separated(folder / "table.csv", ",")),
    ),
    "table tsv": Format(
        {"table.tsv": CSV.replace(",", "\t")}, {"path": "FOLDER/table.tsv", "images": "FOLDER/images"},
        lambda folder: plain.table(plain.separated(folder / "table.tsv", "\t")),
    ),
    "karpathy-retrieval": Format(
        {"karpathy.json": {"images": [{"filename": f"{n}.jpg", "cocoid": n, "split": "test",
                                       "sentences": [{"raw": f"a {n}"}]} for n in range(3)]}},
        {"annotations": "FOLDER/karpathy.json", "images": "FOLDER/images", "find": "texts"},
        lambda folder: [(row[0], row[1], None, None) for row in plain.karpathy(folder)],
    ),
    "sugarcrepe": Format(
        {"crepe/add.json": {str(n): {"filename": f"{n}.jpg", "caption": "a", "negative_caption": "b"}
                            for n in range(2)}},
        {"annotations": "FOLDER/crepe", "images": "FOLDER/images"},
        plain.counted(lambda folder: list(plain.parsed(plain.text_of(folder / "crepe/add.json")))),
    ),
    "vist": Format(
        {"vist.json": {"annotations": STORIES}}, {"annotations": "FOLDER/vist.json", "images": "FOLDER/images"},
        plain.counted(plain.stories),
    ),
    "visdial": Format(
        {"visdial.json": VISDIAL},
        {"annotations": "FOLDER/visdial.json", "images": "FOLDER/images", "find": "images", "rounds": [2]},
        plain.counted(lambda folder: plain.parsed(plain.text_of(folder / "visdial.json"))["data"]["dialogs"]),
    ),
    "visdial answers": Format(
        {"visdial.json": VISDIAL}, {"annotations": "FOLDER/visdial.json", "images": "FOLDER/images", "find": "answers"},
        plain.counted(lambda folder: [turn for dialog in plain.parsed(plain.text_of(folder / "visdial.json"))["data"][
            "dialogs"] for turn in dialog["dialog"]]),
    ),
}  # fmt: skip
BINARY = ("tar", "parquet", "saved-dataset", "caption-folder", "classes")


class Data:
    """Data files."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._images = folder, folder / "images"
        self._images.mkdir()
        for number, name in enumerate(IMAGES):
            tiny_image(number % 4).save(self._images / name)
        for number in range(2):
            (self._images / "test" / str(number)).mkdir(parents=True)
            tiny_image(number).save(self._images / "test" / str(number) / "image.png")
            tiny_image(number).save(self._images / f"VisualDialog_val2018_{number:012d}.jpg")
        for name, made in FORMATS.items():
            self._write(made)
            self._read(name)
        self._make_binary()
        for name in BINARY:
            self._read_binary(name, self._folder / name)

    def named(self) -> dict[str, Act]:
        """Return the rows that were read silently wrong once, and files that are none."""
        acts: dict[str, Act] = {
            f"{name}: {what}": functools.partial(self._refused, name, content)
            for name, contents in SILENT.items()
            for what, content in contents.items()
        }
        for name, made in FORMATS.items():
            file = next(iter(made.files))
            for what, content in CONTENTS.items():
                acts[f"{name}: {what}"] = functools.partial(self._bytes, name, {file: content})
            acts[f"{name}: a pipe"] = functools.partial(self._special, name, file, os.mkfifo)
            acts[f"{name}: a folder"] = functools.partial(self._special, name, file, os.mkdir)
        acts["karpathy: an unknown split"] = functools.partial(
            self._options, "karpathy", {"split": ["test", "typo"]}, must_refuse=True
        )
        acts["tar: two members of one name"] = self._doubled_members
        acts["tar: a member's name in Latin-1"] = self._latin
        acts["tar: a damaged index"] = self._damaged_index
        acts["vqa: a pattern that reads attributes"] = functools.partial(
            self._options, "vqa", {"name": "{0.__class__}"}, must_refuse=True
        )
        return acts

    def draw(self, chance: random.Random) -> tuple[str, Act]:
        """Return a damaged file of a random format."""
        kind = chance.random()
        if kind < 0.25:
            name, seed = chance.choice(BINARY), chance.randrange(10**9)
            return f"{name}, damage {seed}", functools.partial(self._binary, name, seed)
        name = chance.choice(list(FORMATS))
        made = FORMATS[name]
        if kind < 0.32:
            options = changed(made.options, chance)
            return f"{name} with {options}", functools.partial(self._options, name, options)
        file = chance.choice(list(made.files))
        skip = chance.choice((0.0, 0.0, 0.9))
        if made.json and kind < 0.8:
            content = changed({"": made.files[file]}, chance).get("")
            data = encoded(file, content).encode()
        else:
            data = damaged(encoded(file, made.files[file]).encode(), chance)
            if chance.random() < 0.05:
                data = chance.choice((gzip.compress(data), b"\xef\xbb\xbf" + data, data.replace(b"\n", b"\r\n")))
        return f"{name}, skip {skip}: {data[:400]!r}", functools.partial(self._bytes, name, {file: data}, skip=skip)

    def _write(self, made: Format, contents: dict[str, bytes] | None = None) -> None:
        for file, content in made.files.items():
            path = self._folder / file
            path.parent.mkdir(exist_ok=True)
            if path.is_dir():
                path.rmdir()
            path.unlink(missing_ok=True)
            path.write_bytes((contents or {}).get(file, encoded(file, content).encode()))

    def _spec(self, name: str, options: dict[str, Any]) -> DataSpec:
        placed = {
            key: value.replace("FOLDER", str(self._folder)) if isinstance(value, str) else value
            for key, value in options.items()
        }
        return DataSpec.model_validate({"format": name.partition(" ")[0], **placed})

    def _read(self, name: str, skip: float = 0.0) -> None:
        """Read the files of a format as they are; the items are those of the plain reading."""
        source = read_source(self._spec(name, FORMATS[name].options), skip=skip)
        check_texts(source.items)
        fingerprint([source])
        if skip and source.report.left_out():
            return
        try:
            rows = FORMATS[name].rows(self._folder)
        except Exception as error:
            raise AssertionError(f"read as {[shown(item) for item in source.items][:4]}: {error!r}") from None
        compare([shown(item) for item in source.items], rows)

    def _bytes(self, name: str, contents: dict[str, bytes], skip: float = 0.0) -> None:
        self._write(FORMATS[name], contents)
        try:
            self._read(name, skip)
        finally:
            self._write(FORMATS[name])

    def _refused(self, name: str, content: Any) -> None:
        """Read a file that has to be refused."""
        file = next(iter(FORMATS[name].files))
        self._bytes(name, {file: content if isinstance(content, bytes) else encoded(file, content).encode()})
        raise AssertionError("it was read")

    def _special(self, name: str, file: str, make: Callable[[Path], Any]) -> None:
        path = self._folder / file
        path.unlink()
        make(path)
        try:
            self._read(name)
        finally:
            self._write(FORMATS[name])
        raise AssertionError("it was read")

    def _options(self, name: str, options: dict[str, Any], *, must_refuse: bool = False) -> None:
        try:
            spec = self._spec(name, {**FORMATS[name].options, **options})
        except ValueError as error:  # of pydantic, as in a recipe
            raise MLLMError(str(error)) from None
        source = read_source(spec)
        check_texts(source.items)
        assert not must_refuse, "it was read"

    def _make_binary(self) -> None:
        folder = self._folder
        samples = [(f"{number:03d}", png(number), f"caption {number}") for number in range(4)]
        (folder / "tar").mkdir()
        write_tar(folder / "tar" / "a.tar", samples)
        (folder / "parquet").mkdir()
        columns: dict[str, Any] = {"image": [{"bytes": png(n), "path": f"{n}.png"} for n in range(4)]}
        columns |= {"question": ["q"] * 4, "answers": [["a", "b"]] * 4, "id": list(range(4))}
        pyarrow.parquet.write_table(pyarrow.table(columns), folder / "parquet" / "a.parquet")
        rows = {"image": [png(n) for n in range(4)], "caption": [f"a {n}" for n in range(4)]}
        datasets.Dataset.from_dict(rows).save_to_disk(folder / "saved-dataset")
        (folder / "caption-folder" / "more").mkdir(parents=True)
        for number, name in enumerate(("a", "b", "more/c")):
            tiny_image(number).save(folder / "caption-folder" / f"{name}.png")
            (folder / "caption-folder" / f"{name}.txt").write_text(f"caption {number}\nanother\n")
        for number, name in enumerate(("cat", "hot_dog")):
            (folder / "classes" / name).mkdir(parents=True)
            tiny_image(number).save(folder / "classes" / name / "1.png")

    def _binary(self, name: str, seed: int) -> None:
        """Damage a file of a folder in bytes, or replace it."""
        chance, copy = random.Random(seed), self._folder / f"copy-{seed}"
        shutil.copytree(self._folder / name, copy)
        try:
            files = sorted(file for file in copy.rglob("*") if file.is_file())
            file = chance.choice(files)
            kind = chance.random()
            if kind < 0.1:
                file.unlink()
                if chance.random() < 0.5:
                    chance.choice((os.mkfifo, os.mkdir))(file)
            else:
                file.write_bytes(damaged(file.read_bytes(), chance))
            self._read_binary(name, copy)
        finally:
            shutil.rmtree(copy)

    def _read_binary(self, name: str, folder: Path) -> None:
        kinds = {
            "tar": ("webdataset", {"path": str(folder), "image": "png"}),
            "parquet": ("parquet", {"path": str(folder), "answers": "answers", "question": "question", "id": "id"}),
            "saved-dataset": ("saved-dataset", {"path": str(folder), "answers": "caption"}),
            "caption-folder": ("caption-folder", {"path": str(folder)}),
            "classes": ("classes", {"path": str(folder)}),
        }
        reader, options = kinds[name]
        source = read_source(DataSpec.model_validate({"format": reader, **options}))
        items = list(source.items)
        check_texts(items)
        fingerprint([source])
        for item in items:
            for image in item.images:
                with contextlib.suppress(MLLMError):
                    image.open()
        expected = {"caption-folder": 3, "classes": 2}.get(name, 4)
        if name == "tar":
            names = {member.partition(".")[0] for member in members(folder / "a.tar")}
            read = {item.id.rpartition("/")[2] for item in items}
            assert read == names, f"{sorted(read)} instead of {sorted(names)}"
        elif name == "parquet":
            assert len(items) == pyarrow.parquet.ParquetFile(folder / "a.parquet").metadata.num_rows
        elif name in ("saved-dataset", "caption-folder"):
            reported = sum(source.report.left_out().values())
            assert len(items) + reported == expected, f"{len(items)} items instead of {expected}"
        assert all(item.images and (item.answers or name == "parquet") for item in items)

    def _doubled_members(self) -> None:
        write_tar(self._folder / "doubled.tar", [("a", png(0), "one"), ("a", png(1), "two")])
        read_source(
            DataSpec.model_validate({"format": "webdataset", "path": str(self._folder / "doubled.tar"), "image": "png"})
        )
        raise AssertionError("it was read")

    def _latin(self) -> None:
        path = self._folder / "latin.tar"
        with tarfile.open(path, "w", encoding="latin-1", format=tarfile.GNU_FORMAT) as archive:
            for name, data in (("caf\xe9.png", png(0)), ("caf\xe9.txt", b"one")):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
        (item,) = read_source(
            DataSpec.model_validate({"format": "webdataset", "path": str(path), "image": "png"})
        ).items
        assert item.answers == ("one",) and item.images[0].open().tobytes() == tiny_image(0, size=(8, 8)).tobytes()
        check_texts([item])

    def _damaged_index(self) -> None:
        """Damage every cached index of tars: what is read is right."""
        folder = Path(os.environ["MLLM_CACHE"]) / "tars"
        self._read_binary("tar", self._folder / "tar")
        for index in folder.glob("*.npz"):
            for content in (b"", b"PK", index.read_bytes()[:-30], b"\x80\x04N."):
                index.write_bytes(content)
                self._read_binary("tar", self._folder / "tar")
            index.unlink()
            os.mkfifo(index)
            self._read_binary("tar", self._folder / "tar")
            break


def encoded(file: str, content: Any) -> str:
    """Return a content as the text of its file: JSON lines for a list in a ``.jsonl``, else JSON; a text as it is."""
    if isinstance(content, str):
        return content
    if file.endswith(".jsonl") and isinstance(content, list):
        return "".join(json.dumps(row) + "\n" for row in content)
    return json.dumps(content)


def png(seed: int) -> bytes:
    buffer = io.BytesIO()
    tiny_image(seed, size=(8, 8)).save(buffer, "PNG")
    return buffer.getvalue()


def write_tar(path: Path, samples: Sequence[tuple[str, bytes, str]]) -> None:
    with tarfile.open(path, "w") as archive:
        for name, image, text in samples:
            for suffix, data in (("png", image), ("txt", text.encode())):
                member = tarfile.TarInfo(f"{name}.{suffix}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))


def members(path: Path) -> list[str]:
    """Return the names of a tar's files, by its headers alone; they are of the kinds that this module writes."""
    data, names, position = path.read_bytes(), [], 0
    while data[position : position + 512].strip(b"\0"):
        head = data[position : position + 512]
        kind, size = head[156:157], int(head[124:135].strip(b" \0") or b"0", 8)
        if kind in (b"0", b"\0", b"7"):
            names.append(head[:100].partition(b"\0")[0].decode(errors="surrogateescape"))
        position += 512 + -(-size // 512) * 512
    return [name for name in names if not any(part.startswith(".") for part in name.split("/"))]


def shown(item: Item) -> plain.Row:
    """Return an item as a row of the plain reading."""
    names = tuple(image.path.name for image in item.images if isinstance(image, ImageFile))
    return item.id, names, item.question, item.answers


def compare(items: Sequence[plain.Row], rows: Sequence[plain.Row]) -> None:
    """Compare the items with the rows of the plain reading, as far as these say."""
    assert len(items) == len(rows), f"{len(items)} items of {len(rows)} rows"
    masked = [
        tuple(None if expected is None else value for value, expected in zip(item, row, strict=True))
        for item, row in zip(items, rows, strict=True)
    ]
    wanted = [(row[0], row[1] and tuple(Path(name).name for name in row[1]), *row[2:]) for row in rows]
    assert Counter(masked) == Counter(wanted), f"{(Counter(masked) - Counter(wanted))} instead of {wanted}"[:500]


def check_texts(items: Sequence[Item]) -> None:
    """Check that every text of the items is text that can be tokenized."""
    for item in items:
        texts = [item.id, item.question, item.kind, *item.answers, *item.choices]
        texts += [piece for piece in item.document if isinstance(piece, str)]
        for shot in item.shots:
            texts += [shot.question, *shot.answers]
        for message in item.messages:
            texts += [part.get("text") for part in message["content"]]
        for text in texts:
            assert text is None or (isinstance(text, str) and text.encode() is not None), f"{text!r} is no text"
    assert torch.get_num_threads() > 0


CONTENTS = {
    "empty": b"",
    "null": b"null",
    "a number": b"1",
    "deep": b"[" * 100_000,
    "deep and closed": b"[" * 20_000 + b"]" * 20_000,
    "UTF-16": "[]".encode("utf-16"),
    "Latin-1": b'[{"image": "caf\xe9"}]',
    "NUL": b"\0" * 100,
    "5,000 digits": b'{"images": ' + b"9" * 5_000 + b"}",
    "NaN": b"NaN",
}
SILENT: dict[str, dict[str, Any]] = {
    "table csv": {
        "a comma without quotes": "image,caption\n0.jpg,a dog, brown\n",
        "too few fields": "image,caption\n0.jpg\n1.jpg,x\n",
        "a quote that is not closed": 'image,caption\n0.jpg,"a dog\n1.jpg,a cat\n',
        "a quote that swallows rows": 'image,caption\n0.jpg,"a dog\n1.jpg,a cat\n2.jpg,the "end\n',
        "a column twice": "image,caption,caption\n0.jpg,x,y\n",
    },
    "table tsv": {"a quote that swallows rows": 'image\tcaption\n0.jpg\t"x\n1.jpg\ty\n2.jpg\tz"\n'},
    "table json": {
        "NaN": b'[{"image": "0.jpg", "caption": NaN}]',
        "true": [{"image": "0.jpg", "caption": True}],
        "an object": [{"image": "0.jpg", "caption": {"text": "x"}}],
        "a number": [{"image": "0.jpg", "caption": 3}],
        "half a character": b'[{"image": "0.jpg", "caption": "\\ud800"}]',
        "a key twice": b'[{"image": "0.jpg", "caption": "x", "caption": "y"}]',
        "a caption and a question": [{"image": "0.jpg", "caption": "x", "question": "y", "answer": "z"}],
        "an image outside": [{"image": "../coco.json", "caption": "x"}],
        "an absolute image": [{"image": "/etc/passwd", "caption": "x"}],
        "a long name": [{"image": "x" * 300 + ".jpg", "caption": "x"}],
    },
    "coco-captions": {
        "an image id twice": {**COCO, "images": [*COCO["images"], {"id": 0, "file_name": "2.jpg"}]},
        "a caption of no image": {**COCO, "annotations": [{"image_id": 9, "caption": "x"}]},
    },
    "vqa": {"a question twice": {"questions": [{"question_id": 0, "image_id": n, "question": "q"} for n in (0, 1)]}},
    "snli-ve": {"a label that is none": [{"Flickr30K_ID": 0, "pairID": "a", "sentence2": "b", "gold_label": "-"}]},
    "decisions": {"a label that is none": [{"prompt": "x", "label": "maybe"}]},
}
