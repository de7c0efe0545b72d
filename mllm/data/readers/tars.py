"""The reader of WebDataset's tars: an index of where things are, and each sample read from there when it is needed."""

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

from mllm.data.files import form, parsed, some, texts
from mllm.data.items import Item
from mllm.data.lazy import Lazy
from mllm.errors import MLLMError
from mllm.media.images import MAX_BYTES, ImageBytes
from mllm.system import cache_dir, write


class Index(NamedTuple):
    """Where a tar has its samples: names ``(N,)``, and ``(N, 4)`` offset and size of the picture and of the text."""

    names: np.ndarray
    spans: np.ndarray


@dataclass(frozen=True)
class TarImage:
    """A picture inside a tar."""

    tar: Path
    name: str
    offset: int
    size: int

    def open(self) -> Image.Image:
        """Return the picture, RGB."""
        return self._read().open()

    def key(self) -> str:
        """Return a hash of the picture's bytes."""
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
    """Read pictures with texts out of WebDataset's tars: members of one name up to the first dot are one sample.

    Nothing is unpacked, and neither pictures nor texts are kept in memory. An index of each tar is made once and kept
    in the cache folder. Training takes the tars in a new order every epoch, and mixes the samples of four at a time.

    Args:
        path: a tar, a folder of tars, or a pattern such as ``cc3m-{0000..0331}.tar``. Plain tars, not compressed ones.
        image: the picture's ending, or several of which the first that is there is taken.
        text: the ending of the text; with ``answers`` of a JSON object.
        answers: the object's key of the caption or the answers; None: the text is the caption, as it stands.
        question: the object's key of the question; None: captions are wanted.
        missing: ``drop`` leaves out samples without a picture or a text.

    Raises:
        MLLMError: no tars, one that is compressed or cut short, samples without a picture or a text.
    """
    tars = _tars(path)
    indices = [_index(tar, image.split(";"), text) for tar in tars]
    lacking = [f"{tar.name}/{name}" for tar, index in zip(tars, indices, strict=True) for name in _lacking(index)]
    if lacking and missing == "raise":
        raise MLLMError(
            f"{path}: {len(lacking)} samples lack a picture ({image}) or a text ({text}): {some(lacking)}. "
            "Set missing: drop to leave them out."
        )
    kept = [index.spans[(index.spans >= 0).all(1)] for index in indices]
    names = [index.names[(index.spans >= 0).all(1)] for index in indices]
    starts = [0, *accumulate(len(spans) for spans in kept)]

    def make(place: int) -> Item:
        which = bisect_right(starts, place) - 1
        tar, row = tars[which], place - starts[which]
        name = names[which][row].decode()
        picture_at, picture_size, at, size = map(int, kept[which][row])
        picture = TarImage(tar, name, picture_at, picture_size)
        asked, told = _words(_bytes(tar, at, size), answers, question, f"{tar}, {name}.{text}")
        return Item(f"{tar.stem}/{name}", (picture,), tuple(told), asked)

    def fingerprint() -> str:
        parts = [*(tar.name.encode() for tar in tars), *(part.tobytes() for part in (*names, *kept))]
        return hashlib.sha256(b"\0".join(parts)).hexdigest()

    shards = [range(start, end) for start, end in pairwise(starts) if end > start]
    return Lazy(starts[-1], make, fingerprint=fingerprint, shards=shards)


def _tars(path: str) -> list[Path]:
    if Path(path).is_dir():
        found = sorted(Path(path).glob("*.tar"))
    else:
        try:
            from webdataset.shardlists import expand_urls
        except ImportError:
            raise MLLMError("Patterns of tars need webdataset: pip install 'mllm-assembly[data]'.") from None
        found = [Path(name) for name in expand_urls(path)] if "{" in path else [Path(path)]
    gone = [str(tar) for tar in found if not tar.is_file()]
    if gone or not found:
        raise MLLMError(f"{path}: {f'these tars are not there: {some(gone)}' if gone else 'no *.tar files there'}.")
    return found


def _index(tar: Path, images: Sequence[str], text: str) -> Index:
    """Return a tar's index, out of the cache where it is there and the tar has not changed."""
    seen = tar.stat()
    key = f"{tar.resolve()} {seen.st_size} {seen.st_mtime_ns} {images} {text}"
    kept = cache_dir() / "tars" / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.npz"
    if kept.is_file():
        with np.load(kept, allow_pickle=False) as arrays:
            return Index(arrays["names"], arrays["spans"])
    index = _scanned(tar, images, text)
    kept.parent.mkdir(parents=True, exist_ok=True)
    write(kept, lambda file: _save(file, index))
    return index


def _save(file: Path, index: Index) -> None:
    with file.open("wb") as stream:
        np.savez(stream, names=index.names, spans=index.spans)


def _scanned(tar: Path, images: Sequence[str], text: str) -> Index:
    samples: dict[str, list[int]] = {}
    ranks: dict[str, int] = {}
    for name, offset, size in _members(tar):
        folder, _, file = name.rpartition("/")
        stem, _, ending = file.partition(".")
        sample, ending = f"{folder}/{stem}" if folder else stem, ending.lower()
        spans = samples.setdefault(sample, [-1, -1, -1, -1])
        if ending == text:
            spans[2:] = offset, size
        elif ending in images and images.index(ending) < ranks.get(sample, len(images)):
            ranks[sample], spans[:2] = images.index(ending), [offset, size]
    return Index(
        np.array([name.encode() for name in samples], dtype=np.bytes_),
        np.array(list(samples.values()), dtype=np.int64).reshape(-1, 4),
    )


def _members(tar: Path) -> Iterator[tuple[str, int, int]]:
    """Yield name, offset and size of every file in a tar."""
    length = tar.stat().st_size
    try:
        with tarfile.open(tar, "r:") as archive:
            while (member := archive.next()) is not None:
                vars(archive)["members"].clear()  # else they are all kept
                if member.offset_data + member.size > length:
                    raise tarfile.ReadError(f"it ends within {member.name}")
                if member.isfile():
                    yield member.name, member.offset_data, member.size
            if _bytes(tar, archive.offset, tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):  # what a whole one ends with
                raise tarfile.ReadError("its end is missing")
    except (tarfile.TarError, OSError) as error:
        raise MLLMError(f"{tar} is no plain tar that can be read: {error}. Is it whole, and not compressed?") from None


def _lacking(index: Index) -> list[str]:
    return [name.decode() for name in index.names[(index.spans < 0).any(1)]]


def _words(data: bytes, answers: str | None, question: str | None, where: str) -> tuple[str | None, list[str]]:
    """Return a sample's question, if it has one, and its captions or answers."""
    try:
        words = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise MLLMError(f"{where} is no text: {error}") from None
    if answers is None:
        return None, texts(words)
    with form(where, "a JSON object with the keys that 'answers' and 'question' name"):
        row = parsed(words, where)
        return str(row[question]) if question else None, texts(row[answers])


def _bytes(tar: Path, offset: int, size: int) -> bytes:
    try:
        with tar.open("rb") as file:
            file.seek(offset)
            return file.read(size)
    except OSError as error:
        raise MLLMError(f"{tar} cannot be read: {error.strerror or error}") from None
