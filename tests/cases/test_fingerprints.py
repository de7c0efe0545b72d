"""The same weights under another configuration are another model: kept features and connectors tell them apart."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import mllm
from mllm.encoders.feature_folder import features_folder
from mllm.encoders.feature_store import open_store
from mllm.errors import MLLMError
from mllm.testing import tiny_image

IMAGE = tiny_image(1)


@pytest.fixture
def changed(tmp_path: Path) -> Callable[..., str]:
    """Return a function that copies a folder and changes a JSON file of it."""

    def copied(folder: str, file: str, **values: Any) -> str:
        place = shutil.copytree(folder, tmp_path / "-".join(values))
        settings = json.loads((place / file).read_text())
        assert settings.keys() >= values.keys()
        (place / file).write_text(json.dumps({**settings, **values}))
        return str(place)

    return copied


@pytest.fixture
def quick_gelu(changed, encoder) -> str:
    return str(changed(encoder, "config.json", hidden_act="quick_gelu"))


@pytest.fixture(scope="module")
def lm(lm_folder) -> str:
    return str(lm_folder())


def test_another_mean_of_the_pixels_has_its_own_place_in_the_feature_cache(changed, encoder, lm):
    other = mllm.assemble(changed(encoder, "preprocessor_config.json", image_mean=[0.1, 0.2, 0.3]), lm, "linear")
    model = mllm.assemble(encoder, lm, "linear")
    assert not torch.equal(other.features([IMAGE]), model.features([IMAGE]))
    assert features_folder(other) != features_folder(model)


def test_another_activation_has_its_own_place_in_the_feature_cache(quick_gelu, encoder, lm):
    model, other = mllm.assemble(encoder, lm, "linear"), mllm.assemble(quick_gelu, lm, "linear")
    assert not torch.equal(other.features([IMAGE]), model.features([IMAGE]))
    assert features_folder(other) != features_folder(model)


def test_kept_features_are_the_encoders_own(quick_gelu, encoder, lm):
    model, other = mllm.assemble(encoder, lm, "linear"), mllm.assemble(quick_gelu, lm, "linear")
    store = open_store(model, "auto")
    store([IMAGE])
    store.flush()
    assert torch.equal(open_store(other, "auto")([IMAGE]), other.features([IMAGE]))


def test_a_connector_is_refused_beside_an_encoder_with_another_activation(quick_gelu, encoder, lm, tmp_path):
    run = Path(mllm.assemble(encoder, lm, "linear").save(tmp_path / "run"))
    saved = json.loads((run / "assembly.json").read_text())
    saved["spec"]["encoder"]["model"] = quick_gelu
    (run / "assembly.json").write_text(json.dumps(saved))
    with pytest.raises(MLLMError):
        mllm.load(run)


def test_fingerprints_of_other_rotary_frequencies_differ(changed, encoder, lm):
    parameters = json.loads((Path(lm) / "config.json").read_text())["rope_parameters"]
    other_lm = changed(lm, "config.json", rope_parameters={**parameters, "rope_theta": 500.0})
    model, other = mllm.assemble(encoder, lm, "linear"), mllm.assemble(encoder, other_lm, "linear")
    batch = model.prepare([["a text long enough to have positions that matter"]])[1]
    assert not torch.equal(other.logits(None, batch), model.logits(None, batch))
    assert other.lm.fingerprint != model.lm.fingerprint
