"""Test tars, saved data sets and documents: all samples are read, lazily, and errors name the file."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mllm.config.data import DataSpec
from mllm.config.prompt import PromptSpec
from mllm.data.items import pieces_of
from mllm.data.readers import tars
from mllm.data.readers.documents import mmc4, obelics
from mllm.data.readers.tables import saved_dataset
from mllm.data.readers.tars import webdataset
from mllm.data.sources import fingerprint, read, read_all
from mllm.data.stream import Stream
from mllm.errors import MLLMError
from mllm.media.images import ImageBytes, ImageFile
from mllm.prompts.pieces import images_of
from mllm.testing import tiny_image


def png(seed: int) -> bytes:
    buffer = io.BytesIO()
    tiny_image(seed).save(buffer, format="PNG")
    return buffer.getvalue()


def pack(path: Path, members: dict[str, bytes], mode: Any = "w") -> None:
    with tarfile.open(path, mode) as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Return a folder of three tars with five samples."""
    folder = tmp_path / "shards"
    folder.mkdir()
    for shard in range(3):
        members: dict[str, bytes] = {}
        for number in range(shard * 5, shard * 5 + 5):
            text = json.dumps({"q": f"what is {number}?", "a": [f"it is {number}"]}).encode()
            members |= {f"x/{number:04}.json": text, f"x/{number:04}.png": png(number)}
            members[f"x/{number:04}.txt"] = f"number {number}\n".encode()
        pack(folder / f"s-{shard}.tar", members)
    return folder


def test_all_samples_of_tars_are_read(shards: Path) -> None:
    items = webdataset(path=str(shards))
    assert len(items) == 15 and [len(shard) for shard in items.shards] == [5, 5, 5]
    assert [(one.id, one.answers, one.question) for one in items[:2]] == [
        ("s-0/x/0000", ("number 0",), None),
        ("s-0/x/0001", ("number 1",), None),
    ]
    for number, one in enumerate(items):
        (image,) = one.images
        assert image.open() == tiny_image(number) and image.key() == ImageBytes(png(number), "").key()
    asked = webdataset(path=f"{shards}/s-{{1..2}}.tar", text="json", answers="a", question="q")[3]
    assert (asked.id, asked.answers, asked.question) == ("s-1/x/0008", ("it is 8",), "what is 8?")


def test_a_tars_index_is_made_once_and_again_when_it_changes(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tars, "cache_dir", lambda: shards / "cache")
    path = str(shards / "s-0.tar")
    first = webdataset(path=path)
    scan = tars._scanned
    monkeypatch.setattr(tars, "_scanned", None)
    again = webdataset(path=path)
    assert again[:] == first[:] and again.fingerprint() == first.fingerprint()
    monkeypatch.setattr(tars, "_scanned", scan)
    pack(shards / "s-0.tar", {"a.png": png(1), "a.txt": b"new"})
    assert webdataset(path=path)[0].answers == ("new",) and webdataset(path=path).fingerprint() != first.fingerprint()


def test_a_stream_skips_tars_without_reading_them(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = DataSpec.model_validate({"format": "webdataset", "path": str(shards)})

    def stream() -> Stream:
        return Stream(read_all([spec]), PromptSpec(), seed=0)

    whole = stream()
    batches = [whole.take(4) for _ in range(9)]
    names = [images_of(pieces)[0].name for batch in batches for pieces in batch]
    assert sorted(names[:15]) == sorted(names[15:30]) and names[:15] != names[15:30]
    resumed, real = stream(), tars._bytes
    monkeypatch.setattr(tars, "_bytes", None)
    resumed.skip(6, 4)
    monkeypatch.setattr(tars, "_bytes", real)
    assert [resumed.take(4) for _ in range(3)] == batches[6:]
    part = read(DataSpec.model_validate({"format": "webdataset", "path": str(shards), "fraction": 0.4}))
    assert len(part) == 6 and {one.id for one in part} < {one.id for one in webdataset(path=str(shards))}
    assert fingerprint(read_all([spec])) == fingerprint(read_all([spec]))


def test_damaged_tars_are_refused(shards: Path, tmp_path: Path) -> None:
    def refused(message: str, path: Any, **options: Any) -> None:
        with pytest.raises(MLLMError, match=message):
            webdataset(path=str(path), **options)

    pack(tmp_path / "half.tar", {"a.png": png(0), "a.txt": b"x", "b.png": png(1), "c.txt": b"c"})
    refused(r"2 samples lack an image \(jpg;.*\) or a text \(txt\): half.tar/b, half.tar/c. Set missing", tmp_path)
    assert [one.id for one in webdataset(path=str(tmp_path / "half.tar"), missing="drop")] == ["half/a"]
    pack(tmp_path / "zip.tar", {"a.png": png(0)}, "w:gz")
    refused("zip.tar is not a readable tar.*uncompressed", tmp_path / "zip.tar")
    (tmp_path / "cut.tar").write_bytes((shards / "s-0.tar").read_bytes()[:1400])
    refused("cut.tar is not a readable tar", tmp_path / "cut.tar")
    refused("missing tars: .*s-3.tar", f"{shards}/s-{{2..3}}.tar")
    (tmp_path / "empty").mkdir()
    refused(r"no \*.tar files", tmp_path / "empty")
    pack(tmp_path / "odd.tar", {"a.png": b"no image", "a.txt": b"\xff\xfe\xfa", "b.png": png(0), "b.txt": b" "})
    spec = DataSpec.model_validate({"format": "webdataset", "path": str(tmp_path / "odd.tar")})
    for pieces in Stream(read_all([spec]), PromptSpec(), seed=0).take(2):
        with pytest.raises(MLLMError, match=r"odd.tar, a.txt is not text|'odd/b' has no answer"):
            images_of(pieces)[0].open()


def test_a_data_set_that_datasets_saved(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    datasets = pytest.importorskip("datasets")
    rows = {"image": [tiny_image(0), tiny_image(1)], "caption": [["one", "two"], ["three"]], "n": [7, 8]}
    texts = datasets.Sequence(datasets.Value("string"))
    features = datasets.Features({"image": datasets.Image(), "caption": texts, "n": datasets.Value("int32")})
    data = datasets.Dataset.from_dict(rows, features=features)
    data.save_to_disk(tmp_path / "plain")
    datasets.DatasetDict(train=data).save_to_disk(tmp_path / "split")
    items = saved_dataset(path=str(tmp_path / "plain"), answers="caption", id="n")
    assert [(one.id, one.answers) for one in items] == [("7", ("one", "two")), ("8", ("three",))]
    assert [one.images[0].open() for one in items] == [tiny_image(0), tiny_image(1)]
    assert saved_dataset(path=str(tmp_path / "split"), split="train", answers="caption")[1].answers == ("three",)
    for path, options, message in (
        ("split", {}, "has no split None. Known: train"),
        ("plain", {"answers": "captions"}, "no column 'captions'. Did you mean 'caption'"),
        ("none", {}, "is not a readable data set"),
    ):
        with pytest.raises(MLLMError, match=message):
            saved_dataset(path=str(tmp_path / path), **options)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for index in range(3):
        tiny_image(index).save(tmp_path / f"{index}.png")
    return tmp_path


def lines(folder: Path, *rows: Any) -> dict[str, Any]:
    (folder / "docs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return {"path": str(folder / "docs.jsonl"), "images": str(folder)}


def info(name: str, index: int, similarity: float = 0.3) -> dict[str, Any]:
    return {"image_name": name, "raw_url": "", "matched_text_index": index, "matched_sim": similarity}


def test_documents_of_mmc4(folder: Path, tiny_model: Callable[..., Any]) -> None:
    row = {"text_list": ["One.", "Two.", "Three."], "image_info": [info("1.png", 2), info("0.png", 0, 0.1)]}
    image = [ImageFile(folder / f"{index}.png") for index in range(3)]
    (one,) = mmc4(**lines(folder, row))
    assert one.document == (image[0], "One. Two.", image[1], "Three.") and one.images == (image[0], image[1])
    (one,) = mmc4(**lines(folder, row), min_similarity=0.24)
    assert one.document == ("One. Two.", image[1], "Three.")
    model = tiny_model({"type": "linear", "tokens": 4})
    encoded = model.encode(pieces_of(one, PromptSpec()))
    assert sum(encoded.visual) == 4 and all(
        label < 0 for label, v in zip(encoded.labels, encoded.visual, strict=True) if v
    )


def test_documents_of_obelics(folder: Path) -> None:
    row = {"texts": ["One.", None, None, "Two.", "Three."], "images": [None, "0.png", "2.png", None, None]}
    image = [ImageFile(folder / f"{index}.png") for index in range(3)]
    one, other = obelics(**lines(folder, row, {"texts": ["Words."], "images": [None]}))
    assert one.document == ("One.", image[0], image[2], "Two.\n\nThree.") and other.document == ("Words.",)
    (folder / "more").mkdir()
    (folder / "docs.jsonl").rename(folder / "more" / "a.jsonl")
    assert [one.id for one in obelics(path=str(folder / "more"), images=str(folder))] == ["a/1", "a/2"]


@pytest.mark.parametrize(
    ("reader", "row", "message"),
    [
        (mmc4, {"text_list": ["a"], "image_info": [info("0.png", 1)]}, "matched_text_index is 1; expected 0 to 0"),
        (mmc4, {"text_list": ["a"], "image_info": [info("9.png", 0)]}, "1 of 1 images are missing.*missing: drop"),
        (mmc4, {"text_list": ["a"], "image_info": [info("../0.png", 0)]}, "outside of"),
        (mmc4, {"texts": ["a"]}, "document 1 has an unexpected form"),
        (obelics, {"texts": ["a", None], "images": [None]}, "2 texts and 1 images"),
        (obelics, {"texts": [None], "images": [None]}, "both a text and an image at an index, or neither"),
        (obelics, {"texts": [None], "images": ["0.png"]}, "document 1: no text"),
    ],
)
def test_damaged_documents_are_refused(folder: Path, reader: Any, row: Any, message: str) -> None:
    with pytest.raises(MLLMError, match=message):
        reader(**lines(folder, row))


def test_missing_images_of_documents_can_be_dropped(folder: Path) -> None:
    row = {"texts": ["a", None, "b"], "images": [None, "9.png", None]}
    assert obelics(**lines(folder, row), missing="drop")[0].document == ("a\n\nb",)
