"""Name the fuzzers: what is damaged, and the class that does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tests.fuzz.commands import Commands
from tests.fuzz.data import Data
from tests.fuzz.disk import Disk
from tests.fuzz.features import Features
from tests.fuzz.folders import Folders
from tests.fuzz.harness import Fuzzer
from tests.fuzz.images import Images
from tests.fuzz.recipes import Recipes

KINDS: dict[str, Callable[[Path], Fuzzer]] = {
    "images": Images,
    "recipes": Recipes,
    "data": Data,
    "folders": Folders,
    "features": Features,
    "commands": Commands,
    "disk": Disk,
}
