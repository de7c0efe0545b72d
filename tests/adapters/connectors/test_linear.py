"""The linear connector against plain tensor operations and published sizes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mllm.registry import lookup


def linear(**options):
    return lookup("connectors", "linear")(**{"vis_dim": 6, "lm_dim": 5, "num_patches": 16, "grid": (4, 4), **options})


def test_per_patch_it_is_one_linear_map():
    connector = linear()
    features = torch.randn(2, 16, 6)
    expected = nn.functional.linear(features, connector.project.weight, connector.project.bias)
    assert torch.equal(connector(features), expected)


def test_cells_are_means_of_their_patches():
    connector = linear(tokens=4)
    features = torch.randn(1, 16, 6)
    grid = features.reshape(4, 4, 6)
    cells = torch.stack([grid[r : r + 2, c : c + 2].mean((0, 1)) for r in (0, 2) for c in (0, 2)])
    torch.testing.assert_close(connector(features)[0], connector.project(cells))


def test_one_vector_gives_all_tokens_at_once():
    connector = linear(num_patches=1, grid=None, tokens=3)
    features = torch.randn(2, 1, 6)
    assert connector(features).shape == (2, 3, 5)
    torch.testing.assert_close(connector(features)[1].flatten(), connector.project(features[1, 0]))


@pytest.mark.parametrize(
    ("vis_dim", "patches", "grid", "weights"),
    [(3072, 144, (12, 12), 12_587_008), (1024, 196, (14, 14), 4_198_400)],  # LiMBeR, CLIP RN50x16 and BEiT-L to GPT-J
)
def test_published_sizes(vis_dim, patches, grid, weights):
    with torch.device("meta"):
        connector = linear(vis_dim=vis_dim, lm_dim=4096, num_patches=patches, grid=grid)
    assert sum(parameter.numel() for parameter in connector.parameters()) == weights
    assert connector.num_tokens == patches
