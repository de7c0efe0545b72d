"""Write the demo's images: `python -m mllm.cli.demo DIR` renders four scenes that no recipe trains on, as PNG files."""

from __future__ import annotations

import sys
from pathlib import Path

from mllm.data.emoji.scenes import emoji_scenes
from mllm.errors import MLLMError

NUM_IMAGES = 4
SEED = 2  # the suites use seed 1


def write_images(folder: Path) -> list[Path]:
    """Write the images as ``1.png``, ``2.png``, ... and return their paths.

    Raises:
        MLLMError: the part mllm/openmoji is not installed, or the folder cannot be written.
    """
    items = emoji_scenes(split="val", task="captions", size=NUM_IMAGES, seed=SEED)
    paths = [folder / f"{number}.png" for number in range(1, len(items) + 1)]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for item, path in zip(items, paths, strict=True):
            item.images[0].open().save(path)
    except OSError as error:
        raise MLLMError(
            f"The images in {folder} cannot be written: {error.strerror or error}. Give another folder."
        ) from None
    return paths


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m mllm.cli.demo DIR")
    try:
        print(*write_images(Path(sys.argv[1])), sep="\n")
    except MLLMError as error:
        sys.exit(f"mllm: {error}")
