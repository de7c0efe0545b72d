"""Read WebDataset tars: index each tar once, and read each sample at its offset when it is needed."""

from __future__ import annotations

import hashlib
import tarfile
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image

from mllm.data.files import expect_form, parse_json, some, texts
from mllm.data.items import Item
from mllm.data.lazy import Lazy
from mllm.errors import MLLMError
from mllm.media.images import MAX_BYTES, ImageBytes
from mllm.system import cache_dir, write


class Index(NamedTuple):
    """The samples of a tar: names ``(N,)``, and offset and size of image and text ``(N, 4)``; -1: missing."""

    names: np.ndarray
    spans: np.ndarray


@dataclass(frozen=True)
class TarImage:
    """An image inside a tar."""

    tar: Path
    name: str
    offset: int
    size: int

    def open(self) -> Image.Image:
        """Return the image, RGB."""
        return self._read().open()

    def key(self) -> str:
        """Return a hash of the image's bytes."""
        return self._read().key()

    def _read(self) -> ImageBytes:
        label = f"{self.tar}, {self.name}"
        if self.size > MAX_BYTES:
            raise MLLMError(f"{label}: {self.size} bytes; at most {MAX_BYTES} are read. Make it smaller.")
        return ImageBytes(_bytes(self.tar, self.offset, self.size), label)


def webdataset(
    *,
    path: str,
    image: str = "jpg;jpeg;png;webp",
    text: str = "txt",
    answers: str | None = None,
    question: str | None = None,
    missing: Literal["raise", "drop"] = "raise",
) -> Lazy:
    """Read images with texts from WebDataset tars: members with the same name up to the first dot are one sample.

    Nothing is unpacked, and neither images nor texts are kept in memory. An index of each tar is made once and stored
    in the cache folder. Training shuffles the tars every epoch, and mixes the samples of four at a time.

    Args:
        path: a tar, a folder of tars, or a pattern such as ``cc3m-{0000..0331}.tar``. Tars must not be compressed.
        image: the suffix of images, or several, of which the first that exists is used.
        text: the suffix of texts; with ``answers``, of JSON objects.
        answers: the key of the caption or answers in the JSON object; None: the whole text is the caption.
        question: the key of the question in the JSON object; None: the answers are captions.
        missing: ``drop`` leaves out samples without an image or a text.

    Raises:
        MLLMError: there are no tars, a tar is compressed or truncated, or samples lack an image or a text.
    """
    tars = _tars(path)
    indices = [_index(tar, image.split(";"), text) for tar in tars]
    lacking = [f"{tar.name}/{name}" for tar, index in zip(tars, indices, strict=True) for name in _lacking(index)]
    if lacking and missing == "raise":
        raise MLLMError(
            f"{path}: {len(lacking)} samples lack an image ({image}) or a text ({text}): {some(lacking)}. "
            "Set missing: drop to leave them out."
        )
    spans = [index.spans[(index.spans >= 0).all(1)] for index in indices]
    names = [index.names[(index.spans >= 0).all(1)] for index in indices]
    starts = [0, *accumulate(len(rows) for rows in spans)]

    def make(index: int) -> Item:
        shard = bisect_right(starts, index) - 1
        tar, row = tars[shard], index - starts[shard]
        name = names[shard][row].decode()
        image_offset, image_size, offset, size = map(int, spans[shard][row])
        source = TarImage(tar, name, image_offset, image_size)
        asked, captions = _texts_of(_bytes(tar, offset, size), answers, question, f"{tar}, {name}.{text}")
        return Item(f"{tar.stem}/{name}", (source,), tuple(captions), asked)

    def fingerprint() -> str:
        parts = [*(tar.name.encode() for tar in tars), *(part.tobytes() for part in (*names, *spans))]
        return hashlib.sha256(b"\0".join(parts)).hexdigest()

    shards = [range(start, end) for start, end in pairwise(starts) if end > start]
    return Lazy(starts[-1], make, fingerprint=fingerprint, shards=shards)


def _tars(path: str) -> list[Path]:
    if Path(path).is_dir():
        tars = sorted(Path(path).glob("*.tar"))
    else:
        try:
            from webdataset.shardlists import expand_urls
        except ImportError:
            raise MLLMError("A pattern of tars needs webdataset: pip install 'mllm-assembly[data]'.") from None
        tars = [Path(name) for name in expand_urls(path)] if "{" in path else [Path(path)]
    missing = [str(tar) for tar in tars if not tar.is_file()]
    if missing or not tars:
        problem = f"missing tars: {some(missing)}" if missing else "contains no *.tar files"
        raise MLLMError(f"{path}: {problem}. Expected existing tars: correct the path, or add the files.")
    return tars


def _index(tar: Path, images: Sequence[str], text: str) -> Index:
    """Return a tar's index, from the cache if it is there and the tar has not changed."""
    status = tar.stat()
    key = f"{tar.resolve()} {status.st_size} {status.st_mtime_ns} {images} {text}"
    cached = cache_dir() / "tars" / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.npz"
    if cached.is_file():
        with np.load(cached, allow_pickle=False) as arrays:
            return Index(arrays["names"], arrays["spans"])
    index = _scanned(tar, images, text)
    cached.parent.mkdir(parents=True, exist_ok=True)
    write(cached, lambda file: _save(file, index))
    return index


def _save(file: Path, index: Index) -> None:
    with file.open("wb") as stream:
        np.savez(stream, names=index.names, spans=index.spans)


def _scanned(tar: Path, images: Sequence[str], text: str) -> Index:
    samples: dict[str, list[int]] = {}
    ranks: dict[str, int] = {}
    for name, offset, size in _members(tar):
        folder, _, file = name.rpartition("/")
        stem, _, suffix = file.partition(".")
        sample, suffix = f"{folder}/{stem}" if folder else stem, suffix.lower()
        spans = samples.setdefault(sample, [-1, -1, -1, -1])
        if suffix == text:
            spans[2:] = offset, size
        elif suffix in images and images.index(suffix) < ranks.get(sample, len(images)):
            ranks[sample], spans[:2] = images.index(suffix), [offset, size]
    return Index(
        np.array([name.encode() for name in samples], dtype=np.bytes_),
        np.array(list(samples.values()), dtype=np.int64).reshape(-1, 4),
    )


def _members(tar: Path) -> Iterator[tuple[str, int, int]]:
    """Yield the name, offset and size of every file in a tar."""
    length = tar.stat().st_size
    try:
        with tarfile.open(tar, "r:") as archive:
            while (member := archive.next()) is not None:
                vars(archive)["members"].clear()  # otherwise the archive keeps all of them in memory
                if member.offset_data + member.size > length:
                    raise tarfile.ReadError(f"it ends within {member.name}")
                if member.isfile():
                    yield member.name, member.offset_data, member.size
            if _bytes(tar, archive.offset, tarfile.BLOCKSIZE) != bytes(
                tarfile.BLOCKSIZE
            ):  # a complete tar ends with zeros
                raise tarfile.ReadError("its end is missing")
    except (tarfile.TarError, OSError) as error:
        raise MLLMError(
            f"{tar} is not a readable tar: {error}. Expected a complete, uncompressed one: pack it again."
        ) from None


def _lacking(index: Index) -> list[str]:
    return [name.decode() for name in index.names[(index.spans < 0).any(1)]]


def _texts_of(data: bytes, answers: str | None, question: str | None, label: str) -> tuple[str | None, list[str]]:
    """Return a sample's question, if it has one, and its captions or answers."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise MLLMError(f"{label} is not text: {error}. Store texts as UTF-8.") from None
    if answers is None:
        return None, texts(text)
    with expect_form(label, "a JSON object with the keys that 'answers' and 'question' name"):
        row = parse_json(text, label)
        return str(row[question]) if question else None, texts(row[answers])


def _bytes(tar: Path, offset: int, size: int) -> bytes:
    try:
        with tar.open("rb") as file:
            file.seek(offset)
            return file.read(size)
    except OSError as error:
        raise MLLMError(f"{tar} cannot be read: {error.strerror or error}") from None
