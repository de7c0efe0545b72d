"""Words in order in closed form: numpy's least squares from features to the embeddings of the first Q tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import mllm
from mllm.data.items import Item
from mllm.errors import MLLMError
from mllm.fits.base import Material
from mllm.fits.connector import ConnectorFit
from mllm.media.images import source_of
from mllm.testing import tiny_image

CAPTIONS = ["red", "a cat", "blue", "dog", "on", "no cats", "as", "left"]


@pytest.fixture
def items() -> list[Item]:
    images = [source_of(tiny_image(seed)) for seed in range(24)]
    return [Item(str(n), (image,), (CAPTIONS[n % 8], "another caption")) for n, image in enumerate(images)]


def assembled(tiny_parts: tuple[str, str], tokens: int = 3, **connector: Any) -> Any:
    encoder = {"model": tiny_parts[0], "select": "pooled"}
    return mllm.assemble(encoder, tiny_parts[1], {"type": "linear", "tokens": tokens, **connector})


def targets(model: Any, items: list[Item], tokens: int) -> np.ndarray[Any, Any]:
    """The embeddings ``(N, Q D_lm)`` of the first captions' letters, filled up with full stops."""
    texts = [(item.answers[0].replace(" ", "") + "." * tokens)[:tokens] for item in items]
    ids = [model.lm.tokenizer.convert_tokens_to_ids(list(text)) for text in texts]
    embeddings: torch.Tensor = model.lm.model.get_input_embeddings().weight[torch.tensor(ids)]
    return embeddings.flatten(1).double().numpy()


@pytest.mark.parametrize("tokens", [1, 3])
@torch.no_grad()
def test_it_is_a_ridge_from_pooled_features_to_the_tokens_in_order(tiny_parts, items, tokens):
    model = assembled(tiny_parts, tokens)
    fit = ConnectorFit(targets="words-in-order", strength=0.02)
    assert fit.problems(model) == []
    fit(model, Material(items, features=model.features))
    x = model.features([item.images[0] for item in items])[:, 0].double().numpy()
    y = targets(model, items, tokens)
    centered = x - x.mean(0)
    penalty = 0.02 * np.mean(np.var(x, axis=0)) * len(x)
    rows = np.concatenate([centered, np.sqrt(penalty) * np.eye(x.shape[1])])  # a ridge is least squares of more rows
    weights, *_ = np.linalg.lstsq(rows, np.concatenate([y - y.mean(0), np.zeros((x.shape[1], y.shape[1]))]), rcond=None)
    expected = centered @ weights + y.mean(0)
    visual = model.connector(torch.tensor(x, dtype=torch.float32)[:, None])
    assert visual.shape == (24, tokens, 32)
    np.testing.assert_allclose(visual.flatten(1).numpy(), expected, atol=1e-3)


@torch.no_grad()
def test_a_vocabulary_names_what_was_fitted(tiny_parts, items):
    model = assembled(tiny_parts, 4, vocabulary={"words": "data", "temperature": 0.01})
    ConnectorFit(targets="words-in-order", strength=1e-9)(model, Material(items[:8], features=model.features))
    words = ["".join(words) for words in model.words([item.images[0] for item in items[:8]])]
    assert words == [(caption.replace(" ", "") + "....")[:4] for caption in CAPTIONS]


@pytest.mark.parametrize("connector", ["linear", "mapper", "mlp"])
def test_tokens_that_share_a_map_are_refused(tiny_parts, items, connector):
    model = mllm.assemble(tiny_parts[0], tiny_parts[1], {"type": connector, "tokens": 4})
    with pytest.raises(MLLMError, match=r"encoder\.select=pooled"):
        ConnectorFit(targets="words-in-order")(model, Material(items, features=model.features))
