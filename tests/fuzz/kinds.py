"""Name the fuzzers: what is damaged, and the class that does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from .commands import Commands
from .data import Data
from .disk import Disk
from .features import Features
from .folders import Folders
from .harness import Fuzzer
from .images import Images
from .recipes import Recipes

KINDS: dict[str, Callable[[Path], Fuzzer]] = {
    "images": Images,
    "recipes": Recipes,
    "data": Data,
    "folders": Folders,
    "features": Features,
    "commands": Commands,
    "disk": Disk,
}
