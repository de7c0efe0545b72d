"""Read WebDataset tars: index each tar once, and read each sample at its offset when it is needed.

A compressed tar is decompressed once into the cache folder, since a sample is read in place.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tarfile
import zipfile
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from mllm.data.files import COMPRESSED, DAMAGED, files_in, parse_json, some, stem_of
from mllm.data.items import Item
from mllm.data.lazy import Lazy
from mllm.data.reading import Reading, reader
from mllm.data.records import FORM_ERRORS
from mllm.data.values import answers_in, captions_in, text_in
from mllm.errors import MLLMError
from mllm.media.images import MAX_BYTES, ImageBytes
from mllm.system import cache_dir, is_hidden, open_regular, write

DOUBLED = -2  # in an index: two members of this name


class Index(NamedTuple):
    """The samples of a tar: names ``(N,)``, and offset and size of image and text ``(N, 4)``; -1: missing."""

    names: np.ndarray
    spans: np.ndarray


@dataclass(frozen=True)
class _Tar:
    """A tar, as its user names it, and the uncompressed file that is read."""

    path: Path
    data: Path

    @property
    def name(self) -> str:
        """Return its name, the same whether it is compressed or not."""
        return f"{stem_of(self.path)}.tar"


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


@reader
def webdataset(
    rows: Reading,
    *,
    path: str,
    image: str = "jpg;jpeg;png;webp",
    text: str = "txt",
    answers: str | None = None,
    question: str | None = None,
) -> Lazy:
    """Read images with texts from WebDataset tars: members with the same name up to the first dot are one sample.

    Neither images nor texts are kept in memory. An index of each tar is made once and stored in the cache folder.
    Training shuffles the tars every epoch, and mixes the samples of four at a time. Hidden members are left out.

    Args:
        rows: the reading.
        path: a tar, a folder of tars, or a pattern such as ``cc3m-{0000..0331}.tar``. A ``tar.gz`` (``bz2``, ``xz``)
            is decompressed into the cache folder once.
        image: the suffix of images, or several, of which the first that exists is used.
        text: the suffix of texts; with ``answers``, of JSON objects.
        answers: the key of the caption or answers in the JSON object; None: the whole text is the caption.
        question: the key of the question in the JSON object; None: the answers are captions.

    Raises:
        MLLMError: there are no tars, a tar is truncated, samples lack an image or a text (unless ``missing`` is
            ``drop``), or a sample has two members of one name.
    """
    tars = [_Tar(tar, _uncompressed(tar)) for tar in _tars(path)]
    indices = [_index(tar.data, image.split(";"), text) for tar in tars]
    _check_samples(rows, path, tars, indices, f"an image ({image}) or a text ({text})")
    spans = [index.spans[(index.spans >= 0).all(1)] for index in indices]
    names = [index.names[(index.spans >= 0).all(1)] for index in indices]
    starts = [0, *accumulate(len(part) for part in spans)]

    def make(index: int) -> Item:
        shard = bisect_right(starts, index) - 1
        tar, row = tars[shard], index - starts[shard]
        name = _readable(names[shard][row])
        image_offset, image_size, offset, size = map(int, spans[shard][row])
        source = TarImage(tar.data, name, image_offset, image_size)
        asked, captions = _texts_of(_bytes(tar.data, offset, size), answers, question, f"{tar.path}, {name}.{text}")
        return Item(f"{stem_of(tar.path)}/{name}", (source,), tuple(captions), asked)

    def fingerprint() -> str:
        parts = [*(tar.name.encode() for tar in tars), *(part.tobytes() for part in (*names, *spans))]
        return hashlib.sha256(b"\0".join(parts)).hexdigest()

    shards = [range(start, end) for start, end in pairwise(starts) if end > start]
    return Lazy(starts[-1], make, fingerprint=fingerprint, shards=shards)


def _check_samples(rows: Reading, path: str, tars: Sequence[_Tar], indices: Sequence[Index], expected: str) -> None:
    """Count samples that lack a member, or have two of one name, as the policy says.

    Raises:
        MLLMError: they are not to be left out.
    """
    lacking: list[str] = []
    for tar, index in zip(tars, indices, strict=True):
        rows.report.rows += len(index.names)
        doubled = (index.spans == DOUBLED).any(1)
        for name in index.names[doubled]:
            rows.bad(f"{tar.path}, {_readable(name)}: two members have one name; expected one. Pack the tar again.")
        lacking += [f"{tar.name}/{_readable(name)}" for name in index.names[(index.spans == -1).any(1) & ~doubled]]
    if lacking and rows.missing == "raise":
        raise MLLMError(
            f"{path}: {len(lacking)} samples lack {expected}: {some(lacking)}. Set missing: drop to leave them out."
        )
    if lacking:
        rows.report.counts["samples without an image or a text"] = len(lacking)


def _readable(name: bytes) -> str:
    """Return a member's name, with bytes that are no UTF-8 escaped."""
    return bytes(name).decode(errors="backslashreplace")


def _tars(path: str) -> list[Path]:
    if os.path.isdir(path):
        tars = files_in(Path(path), ".tar")
    else:
        try:
            from webdataset.shardlists import expand_urls
        except ImportError:
            raise MLLMError("A pattern of tars needs webdataset: pip install 'mllm-assembly[data]'.") from None
        tars = [Path(name) for name in expand_urls(path)] if "{" in path else [Path(path)]
    missing = [str(tar) for tar in tars if not os.path.isfile(tar)]
    if missing or not tars:
        problem = f"missing tars: {some(missing)}" if missing else "contains no *.tar files"
        raise MLLMError(f"{path}: {problem}. Expected existing tars: correct the path, or add the files.")
    return tars


def _uncompressed(tar: Path) -> Path:
    """Return the file to read: the tar, or what a compressed one holds, from the cache folder."""
    opener = COMPRESSED.get(tar.suffix.lower())
    if opener is None:
        return tar
    status = tar.stat()
    key = f"{tar.resolve()} {status.st_size} {status.st_mtime_ns}"
    cached = cache_dir() / "tars" / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.tar"

    def decompress(file: Path) -> None:
        with opener(tar, "rb") as source, file.open("wb") as target:
            shutil.copyfileobj(source, target)

    if not os.path.isfile(cached):
        cached.parent.mkdir(parents=True, exist_ok=True)
        try:
            write(cached, decompress)
        except DAMAGED as error:
            raise MLLMError(f"{tar} cannot be decompressed into {cached.parent}: {error}. Is it complete?") from None
    return cached


def _index(tar: Path, images: Sequence[str], text: str) -> Index:
    """Return a tar's index, from the cache if it is there, intact, and the tar has not changed."""
    status = tar.stat()
    key = f"2 {tar.resolve()} {status.st_size} {status.st_mtime_ns} {images} {text}"
    cached = cache_dir() / "tars" / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.npz"
    index = _cached(cached)
    if index is None:
        index = _scanned(tar, images, text)
        cached.parent.mkdir(parents=True, exist_ok=True)
        write(cached, lambda file: _save(file, index))
    return index


def _cached(file: Path) -> Index | None:
    """Return an index from the cache; None if there is none, or it is damaged."""
    try:
        with open_regular(file) as stream, np.load(stream, allow_pickle=False) as arrays:
            index = Index(arrays["names"], arrays["spans"])
    except (*DAMAGED, *FORM_ERRORS, zipfile.BadZipFile):
        return None
    fits = index.spans.shape == (len(index.names), 4) and index.names.dtype.kind == "S"
    return index if fits and index.spans.dtype == np.int64 else None


def _save(file: Path, index: Index) -> None:
    with file.open("wb") as stream:
        np.savez(stream, names=index.names, spans=index.spans)


def _scanned(tar: Path, images: Sequence[str], text: str) -> Index:
    samples: dict[str, list[int]] = {}
    ranks: dict[str, int] = {}
    kinds: set[tuple[str, str]] = set()
    for name, offset, size in _members(tar):
        folder, _, file = name.rpartition("/")
        stem, _, suffix = file.partition(".")
        sample, suffix = f"{folder}/{stem}" if folder else stem, suffix.lower()
        spans = samples.setdefault(sample, [-1, -1, -1, -1])
        if suffix != text and suffix not in images:
            continue
        if (sample, suffix) in kinds:
            spans[:] = [DOUBLED] * 4
        kinds.add((sample, suffix))
        if spans[0] == DOUBLED:
            continue
        if suffix == text:
            spans[2:] = offset, size
        elif images.index(suffix) < ranks.get(sample, len(images)):
            ranks[sample], spans[:2] = images.index(suffix), [offset, size]
    return Index(
        np.array([name.encode(errors="surrogateescape") for name in samples], dtype=np.bytes_),
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
                    raise tarfile.ReadError(f"it ends within {member.name!a}")
                if member.isfile() and not is_hidden(Path(member.name)):
                    yield member.name, member.offset_data, member.size
            if _bytes(tar, archive.offset, tarfile.BLOCKSIZE) != bytes(
                tarfile.BLOCKSIZE
            ):  # a complete tar ends with zeros
                raise tarfile.ReadError("its end is missing")
    except (tarfile.TarError, OSError) as error:
        raise MLLMError(
            f"{tar} is not a readable tar: {error}. Expected a complete, uncompressed one: pack it again."
        ) from None


def _texts_of(data: bytes, answers: str | None, question: str | None, label: str) -> tuple[str | None, list[str]]:
    """Return a sample's question, if it has one, and its captions or answers."""
    try:
        text = data.decode("utf-8-sig")
        row: Any = text if answers is None else parse_json(text)
        asked = text_in(row[question], "question") if answers and question else None
        values = row if answers is None else row[answers]
        texts = captions_in(values) if asked is None else answers_in(values)
    except UnicodeDecodeError as error:
        raise MLLMError(f"{label} is not text: {error}. Store texts as UTF-8.") from None
    except MLLMError as error:
        raise MLLMError(f"{label}: {error}") from None
    except FORM_ERRORS as error:
        raise MLLMError(
            f"{label} has an unexpected form ({error!r}): expected a JSON object with the keys that 'answers' and "
            "'question' name. Pack the tar again."
        ) from None
    return asked, [text for text in texts if text]


def _bytes(tar: Path, offset: int, size: int) -> bytes:
    try:
        with tar.open("rb") as file:
            file.seek(offset)
            return file.read(size)
    except OSError as error:
        raise MLLMError(f"{tar} cannot be read: {error.strerror or error}") from None
