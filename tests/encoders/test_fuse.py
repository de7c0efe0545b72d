"""Test the fusion of several encoders into one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import mllm
from mllm.build import encoder_of
from mllm.config.messages import checked
from mllm.config.parts import EncoderSpec
from mllm.encoders.feature_folder import features_folder
from mllm.encoders.feature_store import FeatureStore
from mllm.errors import MLLMError
from mllm.testing import ENCODER_FAMILIES, tiny_image, tiny_lm

IMAGES = [tiny_image(1), tiny_image(2, (30, 60))]


def built(**values: Any) -> Any:
    return encoder_of(checked(EncoderSpec, values), seed=0)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return {name: ENCODER_FAMILIES[name](tmp_path_factory.mktemp(name)) for name in ("clip", "vit", "convnext", "swin")}


def test_features_are_concatenated_along_the_width(folders: dict[str, str]) -> None:
    first, second = {"model": folders["clip"], "layer": -2}, {"model": folders["convnext"], "resolution": 128}
    fused = built(fuse="width", of=[first, second])
    alone = [built(**member) for member in (first, second)]
    assert (fused.num_patches, fused.dim, fused.grid) == (16, 48, (4, 4))
    expected = torch.cat([encoder(encoder.preprocess(IMAGES)) for encoder in alone], dim=2)
    opened = [fused.open(image) for image in IMAGES]
    assert [fused.open(image) for image in opened] == opened
    torch.testing.assert_close(fused(fused.preprocess(opened)), expected)


def test_features_are_concatenated_along_the_sequence(folders: dict[str, str]) -> None:
    members = [{"model": folders["clip"]}, {"model": folders["vit"], "select": "pooled"}]
    fused = built(type="fuse", fuse="sequence", of=members)
    assert (fused.num_patches, fused.dim, fused.grid) == (17, 24, None)
    expected = [encoder(encoder.preprocess(IMAGES)) for encoder in (built(**member) for member in members)]
    items = [fused.open(image) for image in IMAGES]
    torch.testing.assert_close(fused(fused.preprocess(items)), torch.cat(expected, dim=1))


@pytest.mark.parametrize("meta", [False, True])
def test_incompatible_encoders_are_refused(folders: dict[str, str], meta: bool) -> None:
    with torch.device("meta" if meta else "cpu"):
        with pytest.raises(MLLMError, match=r"the encoders give 16 and 4 features.*fuse=sequence"):
            built(fuse="width", of=[{"model": folders["clip"]}, {"model": folders["swin"]}])
        with pytest.raises(MLLMError, match=r"features are 24 and 32 wide.*fuse=width"):
            built(fuse="sequence", of=[{"model": folders["clip"]}, {"model": folders["swin"]}])
        with pytest.raises(MLLMError, match=r"of\.0\.model|of.0.model"):
            built(fuse="width", of=[{"layer": 1}])
        fused = built(fuse="width", of=[{"model": folders["clip"]}, {"model": "open-clip/RN50x16"}][: 1 + meta][:1])
    assert fused.dim == 24


def test_a_shape_is_fused_on_the_meta_device(folders: dict[str, str]) -> None:
    with torch.device("meta"):
        fused = built(
            fuse="width",
            of=[{"model": folders["clip"], "resolution": 96}, {"type": "open-clip", "model": "open-clip/RN50x16"}],
        )
    assert (fused.num_patches, fused.dim, fused.grid) == (144, 3096, (12, 12))


def test_a_model_with_two_encoders_answers_caches_features_and_is_saved(
    folders: dict[str, str], tmp_path: Path
) -> None:
    encoder = {"fuse": "width", "of": [{"model": folders["clip"]}, {"model": folders["vit"], "layer": 1}]}
    model = mllm.assemble(encoder, tiny_lm(tmp_path / "lm"), "mlp")
    tiny_image(3).save(tmp_path / "a.png")
    prompt = [["What is it?", tmp_path / "a.png"], [IMAGES[0], "A picture of"]]
    answers = [str(answer) for answer in model.generate(prompt, max_new_tokens=4)]
    assert torch.equal(FeatureStore(model)(IMAGES), model.features(IMAGES))
    assert [str(a) for a in mllm.load(model.save(tmp_path / "saved")).generate(prompt, max_new_tokens=4)] == answers
    other = mllm.assemble(encoder | {"of": encoder["of"][::-1]}, tmp_path.as_posix() + "/lm", "mlp")
    folders_used = {features_folder(m) for m in (model, other, mllm.load(tmp_path / "saved"))}
    assert len(folders_used) == 2, "another order gives other features"
