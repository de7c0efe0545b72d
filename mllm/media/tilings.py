"""Cut images into tiles of an encoder's input size, in the published ways.

Any resolution (LLaVA-NeXT, and LLaVA-OneVision, arXiv:2408.03326), dynamic resolution (InternVL 1.5, arXiv:2404.16821)
and the split of Idefics3 (arXiv:2408.12637), which SmolVLM has too.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from PIL import Image

from mllm.media.tiles import TOLERATED, Grid, Layout, Size, Tiling


@dataclass(frozen=True)
class AnyResolution(Tiling):
    """LLaVA-NeXT: the image keeps its aspect ratio, and is padded to the grid that keeps most of its pixels.

    Args:
        choices: the grids; of equally good ones the first.
        unpad: see `Layout`.
        limit: see `Layout`; it is LLaVA-OneVision's ``anyres_max``.
    """

    choices: tuple[Grid, ...]
    unpad: bool = True
    limit: int | None = field(default=None, repr=False)  # it changes no features, which are cached by the others

    def grids(self) -> Sequence[Grid]:
        """Return all grids that an image can have."""
        return self.choices

    def grid(self, size: Size) -> Grid:
        """Return the grid that keeps most of the image's pixels, and of those the one with the least padding."""
        width, height = size

        def quality(grid: Grid) -> tuple[int, int]:
            rows, columns = grid[0] * self.side, grid[1] * self.side
            scale = min(columns / width, rows / height)
            kept = min(int(width * scale) * int(height * scale), width * height)
            return kept, kept - rows * columns

        return max(self.choices, key=quality)

    def layout(self, size: Size) -> Layout:
        """Return the tiles of an image with a size: the whole image, then the grid."""
        rows, columns = grid = self.grid(size)
        return Layout(size, grid, 1 + rows * columns, 0, self.unpad, self.limit)

    @functools.cached_property
    def fullest(self) -> list[Layout]:
        """A layout of every grid, and of those that are reduced also one with a part that is just not."""
        layouts = super().fullest
        if self.limit is None:
            return layouts
        parts = []
        for rows, columns in self.choices:
            if (share := TOLERATED**2 * self.limit / (rows * columns)) < 1:
                size = math.ceil(columns * self.side * share), rows * self.side
                parts.append(Layout(size, (rows, columns), 1 + rows * columns, 0, self.unpad))
        return [*layouts, *parts]

    def cut(self, image: Image.Image) -> list[Image.Image]:
        """Return an RGB image's tiles."""
        rows, columns = self.grid(image.size)
        width, height = columns * self.side, rows * self.side
        across, down = width / image.width, height / image.height
        if across < down:
            size = width, min(math.ceil(image.height * across), height)
        else:
            size = min(math.ceil(image.width * down), width), height
        canvas = Image.new("RGB", (width, height))
        canvas.paste(image.resize(size, self.resample), ((width - size[0]) // 2, (height - size[1]) // 2))
        return [self.whole(image), *self._split(canvas)]


@dataclass(frozen=True)
class DynamicResolution(Tiling):
    """InternVL: the image is stretched to the grid whose aspect ratio is closest; several tiles end with a thumbnail.

    Args:
        least: the smallest number of tiles of the grid.
        most: the largest.
    """

    least: int
    most: int

    def grids(self) -> Sequence[Grid]:
        """Return all grids that an image can have, those with few tiles first."""
        return _grids_of(self.least, self.most)

    def grid(self, size: Size) -> Grid:
        """Return the grid of the closest aspect ratio, and of equal ones the largest that is not too large.

        That is the last one with less than twice as many pixels as the image.
        """
        width, height = size
        best, difference = (1, 1), math.inf
        for rows, columns in self.grids():
            other = abs(width / height - columns / rows)
            if other < difference or (other == difference and width * height > 0.5 * self.side**2 * rows * columns):
                best, difference = (rows, columns), other
        return best

    def layout(self, size: Size) -> Layout:
        """Return the tiles of an image with a size: the grid, then the whole image if the grid has several."""
        rows, columns = grid = self.grid(size)
        tiles = rows * columns + (grid != (1, 1))
        return Layout(size, grid, tiles, tiles - 1, unpad=False)

    def cut(self, image: Image.Image) -> list[Image.Image]:
        """Return an RGB image's tiles."""
        rows, columns = self.grid(image.size)
        tiles = self._split(image.resize((columns * self.side, rows * self.side), self.resample))
        return tiles if len(tiles) == 1 else [*tiles, self.whole(image)]


@dataclass(frozen=True)
class Split(Tiling):
    """Idefics3: the longer side is resized to as many tiles as given, and the image stretched to a multiple of tiles.

    The last tile is the whole image, made smaller once more.

    Args:
        longest: the number of tiles along the longer side.
    """

    longest: int

    def grids(self) -> Sequence[Grid]:
        """Return all grids that an image can have."""
        numbers = range(1, self.longest + 1)
        return [(rows, self.longest) for rows in numbers] + [(self.longest, columns) for columns in numbers]

    def grid(self, size: Size) -> Grid:
        """Return the grid of an image with a size."""
        width, height = self._resized(size)
        ratio = width / height
        if width >= height:
            columns = math.ceil(width / self.side)
            return math.ceil(int(columns * self.side / ratio) / self.side) or 1, columns
        rows = math.ceil(height / self.side)
        return rows, math.ceil(int(rows * self.side * ratio) / self.side) or 1

    def layout(self, size: Size) -> Layout:
        """Return the tiles of an image with a size: the grid, then the whole image if the grid has several."""
        rows, columns = grid = self.grid(size)
        tiles = rows * columns + (grid != (1, 1))
        return Layout(size, grid, tiles, tiles - 1, unpad=False)

    def cut(self, image: Image.Image) -> list[Image.Image]:
        """Return an RGB image's tiles."""
        canvas = self._canvas(image)
        tiles = self._split(canvas)
        return tiles if len(tiles) == 1 else [*tiles, super().whole(canvas)]

    def whole(self, image: Image.Image) -> Image.Image:
        """Return the tile that shows a whole RGB image."""
        return super().whole(self._canvas(image))

    def _canvas(self, image: Image.Image) -> Image.Image:
        rows, columns = self.grid(image.size)
        resized = image.resize(self._resized(image.size), self.resample)
        return resized.resize((columns * self.side, rows * self.side), self.resample)

    def _resized(self, size: Size) -> Size:
        """Return the size at which the longer side has the given number of tiles; the other is even, as published."""
        width, height = size
        longer = self.longest * self.side
        if width >= height:
            shorter = int(longer / (width / height))
            return longer, shorter + shorter % 2 or 1
        shorter = int(longer * (width / height))
        return shorter + shorter % 2 or 1, longer


@functools.cache
def _grids_of(least: int, most: int) -> list[Grid]:
    """Return all grids of ``least`` to ``most`` tiles, by their number, then by columns."""
    sides = range(1, most + 1)
    grids = [(rows, columns) for columns in sides for rows in sides if least <= rows * columns <= most]
    return sorted(grids, key=lambda grid: grid[0] * grid[1])
