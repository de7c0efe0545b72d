"""Test the ways of cutting images by themselves: Idefics3's split, and how many tokens an image takes at most."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Idefics3ImageProcessorPil, SmolVLMImageProcessorPil

import mllm
from mllm.errors import MLLMError
from mllm.media.tiles import Tiling
from mllm.media.tilings import AnyResolution, DynamicResolution, Split
from mllm.testing import ENCODER_FAMILIES

SIDE = 32
RANDOM = np.random.default_rng(1)
SIZES = [(97, 33), (40, 31), (31, 40), (64, 64), (20, 90), (300, 200), (7, 9), (1, 1), (190, 1), (2, 400), (33, 32)]


@pytest.mark.parametrize("longest", [1, 3, 4])
@pytest.mark.parametrize("processor", [Idefics3ImageProcessorPil, SmolVLMImageProcessorPil])
def test_split_is_that_of_idefics3(tmp_path: Path, tiny_parts: Any, processor: Any, longest: int) -> None:
    """Pixels and number of tiles; the filter is that of the encoder's own processor, as with every way of cutting."""
    tower = ENCODER_FAMILIES["siglip"](tmp_path / "siglip")
    encoder = {"model": tower, "tiles": {"kind": "split", "longest": longest}}
    model: Any = mllm.assemble(encoder, tiny_parts[1], {"type": "mlp", "shuffle": 2}, device="cpu")
    own = model.encoder.processor
    stock = processor(
        size={"longest_edge": longest * SIDE},
        max_image_size={"longest_edge": SIDE},
        resample=own.resample,
        image_mean=own.image_mean,
        image_std=own.image_std,
    )
    for width, height in SIZES:
        image = Image.fromarray(RANDOM.integers(0, 256, (height, width, 3), dtype=np.uint8))
        expected = torch.as_tensor(stock(images=[image], return_tensors="pt")["pixel_values"])[0]
        tiles = model.encoder.tiles(image)
        torch.testing.assert_close(model.encoder.preprocess(tiles), expected, rtol=0, atol=0)
        (layout,) = model.layouts([image])
        counted = stock.get_number_of_image_patches(height, width)[0] or 1  # it has 0 for one that is not split
        assert layout.tiles == len(tiles) == len(expected) == counted
        assert model.encode([image]).visual.count(True) == 4 * len(expected)  # a shuffle of 4 x 4 patches


TILINGS: dict[str, Tiling] = {
    "anyres": AnyResolution(SIDE, None, ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))),
    "limit": AnyResolution(SIDE, None, tuple((r, c) for r in range(1, 7) for c in range(1, 7)), limit=9),
    "small limit": AnyResolution(SIDE, None, tuple((r, c) for r in range(1, 5) for c in range(1, 5)), limit=1),
    "dynamic": DynamicResolution(SIDE, None, 1, 12),
    "split": Split(SIDE, None, 4),
}


@pytest.mark.parametrize("patches", [4, 27])
@pytest.mark.parametrize("name", TILINGS)
def test_no_image_takes_more_tokens_or_tiles_than_is_planned(name: str, patches: int) -> None:
    tiling, tokens, grid = TILINGS[name], patches**2, (patches, patches)
    most = max(layout.count(tokens, grid) for layout in tiling.fullest)
    tiles = max(layout.tiles for layout in tiling.fullest)
    sizes = [*RANDOM.integers(1, 40, (500, 2)), *RANDOM.integers(1, 400, (3000, 2))]
    layouts = [tiling.layout((int(width), int(height))) for width, height in sizes]
    counts = [layout.count(tokens, grid) for layout in layouts]
    assert 0.6 * most <= max(counts) <= most
    assert max(layout.tiles for layout in layouts) == tiles


@pytest.mark.parametrize("name", TILINGS)
def test_the_tokens_are_as_many_as_are_counted(name: str) -> None:
    tiling, grid = TILINGS[name], (3, 3)
    for width, height in [*SIZES, (1000, 5), (5, 1000), (200, 170)]:
        layout = tiling.layout((width, height))
        assert len(tiling.cut(Image.new("RGB", (width, height)))) == layout.tiles
        arranged = layout.arranged(torch.randn(layout.tiles, 9, 2), grid, torch.zeros(2))
        assert arranged.shape == (layout.count(9, grid), 2)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "limit": ({"kind": "anyres", "limit": 2, "unpad": False}, "limit reduces rows"),
    "no limit": ({"kind": "anyres", "limit": 0}, "limit"),
    "no grids": ({"kind": "anyres", "grids": 0}, "grids"),
    "too many grids": ({"kind": "anyres", "grids": 11}, "grids"),
    "longest": ({"kind": "split", "longest": 0}, "longest"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_option_is_one_message(tiny_parts: Any, name: str) -> None:
    tiles, message = WRONG[name]
    with pytest.raises(MLLMError, match=message):
        mllm.assemble({"model": tiny_parts[0], "tiles": tiles}, tiny_parts[1], "mlp", device="cpu")
