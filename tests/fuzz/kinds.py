"""Name the fuzzers: what is damaged, and the class that does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from .harness import Fuzzer
from .features import Features
from .folders import Folders
from .images import Images
from .recipes import Recipes

KINDS: dict[str, Callable[[Path], Fuzzer]] = {
    "images": Images,
    "recipes": Recipes,
    "folders": Folders,
    "features": Features,
}
