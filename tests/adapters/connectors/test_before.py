"""Connectors in front of another: noise and the projection onto texts, against the formulas in plain torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mllm.errors import MLLMError
from mllm.registry import lookup

WIDTHS: dict[str, Any] = {"vis_dim": 6, "lm_dim": 8, "num_patches": 3, "grid": None}
FEATURES = torch.randn(4, 3, 6, generator=torch.Generator().manual_seed(1)) * 5


def scaled(x: torch.Tensor) -> torch.Tensor:
    return x / x.square().sum(-1, keepdim=True).sqrt()


def made(name: str, **options: Any) -> Any:
    torch.manual_seed(0)
    return lookup("connectors", name)(**WIDTHS, **options)


@torch.no_grad()
@pytest.mark.parametrize("normalized", [True, False])
def test_noise_is_gaussian_fresh_and_of_training_alone(normalized):
    connector = made("noisy", std=0.3, normalize=normalized, then={"type": "mlp", "hidden": 5})
    clean = scaled(FEATURES) if normalized else FEATURES
    connector.eval()
    torch.testing.assert_close(connector(FEATURES), connector.then(clean))
    connector.train()
    torch.manual_seed(7)
    noisy = clean + 0.3 * torch.randn(4, 3, 6)
    expected = connector.then(scaled(noisy) if normalized else noisy)
    torch.manual_seed(7)
    torch.testing.assert_close(connector(FEATURES), expected)
    assert not torch.allclose(connector(FEATURES), expected), "drawn anew each time"
    silent = made("noisy", std=0, normalize=False).train()
    assert torch.equal(silent(FEATURES), silent.then(FEATURES))


@torch.no_grad()
def test_features_become_the_softmax_mean_of_texts():
    connector = made("nearest-texts", texts=10, sharpness=20, then={"type": "linear", "tokens": None}).eval()
    texts = torch.randn(7, 3, 6)
    connector.collect(texts)
    memory = scaled(texts.mean(1))
    weights = torch.softmax(20 * scaled(FEATURES) @ memory.T, dim=-1)
    torch.testing.assert_close(connector(FEATURES), connector.then(scaled(weights @ memory)))
    torch.testing.assert_close(connector.body(FEATURES), connector.then.body(scaled(weights @ memory)))
    assert torch.equal(connector.train()(FEATURES), connector.then(FEATURES)), "texts pass unchanged"
    always = made("nearest-texts", texts=10, sharpness=20, always=True).train()
    always.load_state_dict(connector.state_dict())
    torch.testing.assert_close(always(FEATURES), connector.eval()(FEATURES))


@torch.no_grad()
def test_a_sharp_projection_is_the_nearest_text():
    connector = made("nearest-texts", texts=7, sharpness=1e5).eval()
    texts = torch.randn(7, 1, 6)
    connector.collect(texts)
    nearest = (scaled(FEATURES) @ scaled(texts[:, 0]).T).argmax(-1)
    torch.testing.assert_close(connector.changed(FEATURES), scaled(texts[:, 0])[nearest], atol=1e-4, rtol=0)


def test_what_follows_owns_the_last_map():
    connector = made("nearest-texts", then={"type": "noisy", "then": {"type": "linear", "tokens": None, "norm": True}})
    assert connector.linear() is connector.then.then.project and connector.output() is connector.then.then.norm
    assert connector.num_tokens == 3 and connector.collected == 0


def test_more_texts_than_places_are_refused():
    with pytest.raises(MLLMError, match=r"places for 2 texts.*connector\.texts=3"):
        made("nearest-texts", texts=2).collect(torch.randn(3, 1, 6))
