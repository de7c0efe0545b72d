"""Test the encoders of timm and open_clip with random weights, in the environment of `make test-extras`."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mllm.build import encoder_of
from mllm.config.messages import checked
from mllm.config.parts import EncoderSpec
from mllm.errors import MLLMError
from mllm.hub import identity
from mllm.hub.published import configuration
from mllm.testing import tiny_image

IMAGES = [tiny_image(1), tiny_image(2, (30, 60))]


def built(**values: Any) -> Any:
    return encoder_of(checked(EncoderSpec, {"init": "random", **values}), seed=0)


def size(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("kind", ["timm", "open-clip"])
def test_without_the_library_the_extra_is_named(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, kind.replace("-", "_"), None)
    with pytest.raises(MLLMError, match=rf"pip install 'mllm-assembly\[{kind}\]'"):
        built(type=kind, model="x")


TIMM = [  # name, number of patches, number of prefix tokens, width
    ("vit_tiny_patch16_224", 196, 1, 192),
    ("vit_small_patch14_reg4_dinov2", 1369, 5, 384),
    ("eva02_tiny_patch14_224", 256, 1, 192),
    ("swin_tiny_patch4_window7_224", 49, 0, 768),
    ("convnext_atto", 49, 0, 320),
    ("nf_resnet50", 64, 0, 2048),
]


@pytest.mark.extras
@pytest.mark.parametrize(("name", "patches", "prefix", "dim"), TIMM)
def test_timm_features_are_those_of_the_whole_model(name: str, patches: int, prefix: int, dim: int) -> None:
    import timm

    encoder = built(type="timm", model=f"timm/{name}")
    assert (encoder.num_patches, encoder.dim) == (patches, dim) and encoder.grid
    pixels = encoder.preprocess(IMAGES)
    assert pixels.shape[0] == 2 and encoder.shape == tuple(pixels.shape[1:])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        reference = timm.create_model(name, pretrained=False).eval()
    reference.load_state_dict(encoder.model.state_dict(), strict=False)  # the classifier is the only difference
    with torch.no_grad():
        expected = reference.forward_features(pixels)
        block = reference.forward_intermediates(pixels, indices=[-2], intermediates_only=True)[0]
        head = reference.forward_head(expected, pre_logits=True)
    if expected.ndim == 4:
        expected = expected.flatten(1, 2) if "swin" in name else expected.flatten(2).mT
    assert torch.equal(encoder(pixels), expected[:, prefix:])
    truncated = built(type="timm", model=name, layer=-2)
    assert torch.equal(truncated(pixels), block.flatten(2).mT) and size(truncated) < size(encoder)
    assert torch.equal(built(type="timm", model=name, select="pooled")(pixels)[:, 0], head)


@pytest.mark.extras
def test_timm_interpolates_positions_and_names_errors() -> None:
    assert built(type="timm", model="vit_tiny_patch16_224", resolution=96).grid == (6, 6)
    every = built(type="timm", model="vit_tiny_patch16_224", layer=-2, select="all")
    assert (every.num_patches, every.grid) == (197, None)
    with torch.device("meta"):
        assert built(type="timm", model="nf_resnet50", select="pooled").num_patches == 1
    for values, message in (
        ({"model": "vit_tiny_patch16_22"}, "timm has no model.*Did you mean 'vit_tiny_patch16_224"),
        ({"model": "vit_tiny_patch16_224", "layer": 40}, "encoder.layer is 40"),
        ({"model": "vit_tiny_patch16_224", "layer": 0}, "counted from 1"),
        ({"model": "vit_tiny_patch16_224", "init": "pretrained"}, r"could not load the weights.*encoder.weights"),
    ):
        with pytest.raises(MLLMError, match=message):
            built(type="timm", **values)


@pytest.mark.extras
@pytest.mark.parametrize(("name", "extra"), [("ViT-B-32", 1), ("RN50", 0)])
def test_open_clip_features_are_those_of_the_whole_tower(name: str, extra: int) -> None:
    import open_clip

    encoder = built(type="open-clip", model=f"open-clip/{name}", layer=-2)
    pixels = encoder.preprocess(IMAGES)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        reference = open_clip.create_model(name, pretrained=None).visual.eval()
    with torch.no_grad():
        expected = reference.forward_intermediates(pixels, indices=[3 if extra == 0 else 10], intermediates_only=True)
        pooled = reference(pixels)
    assert torch.equal(encoder(pixels), expected["image_intermediates"][0].flatten(2).mT)
    assert size(encoder) < size(reference)
    if extra:
        every = built(type="open-clip", model=name, layer=-2, select="all")
        assert torch.equal(every(pixels)[:, 1:], encoder(pixels)) and every.num_patches == encoder.num_patches + 1
    torch.testing.assert_close(built(type="open-clip", model=name, select="pooled")(pixels)[:, 0], pooled)


@pytest.mark.extras
@pytest.mark.parametrize(
    ("model", "values", "grid"),
    [("RN50x16", {}, (12, 12)), ("EVA01-g-14", {"layer": -2, "select": "all"}, None)],
)
def test_published_shapes_are_those_of_the_real_models(model: str, values: dict[str, Any], grid: Any) -> None:
    from mllm.encoders.open_clip_model import OpenClipModel

    published = configuration(f"open-clip/{model}")
    assert published is not None
    with torch.device("meta"):
        encoder = OpenClipModel(model=model, init="random", **values)
    assert (encoder.dim, encoder.grid) == (published["dim"], grid)
    assert encoder.num_patches == published.get("patches", 144)


@pytest.mark.extras
def test_open_clip_says_what_is_wrong() -> None:
    assert built(type="open-clip", model="ViT-B-32", resolution=96).grid == (3, 3)
    for values, message in (
        ({"model": "RN50x17"}, "open_clip has no model 'RN50x17'. Did you mean 'RN50x16'"),
        ({"model": "RN50x16", "init": "pretrained"}, r"encoder.weights is missing.*openai"),
        ({"model": "ViT-B-32", "layer": 30}, "encoder.layer is 30"),
        ({"model": "ViT-B-32", "init": "pretrained", "weights": "/no/file"}, "could not load 'ViT-B-32'"),
    ):
        with pytest.raises(MLLMError, match=message):
            built(type="open-clip", **values)


DIFFERING = [  # two models with the same weights, and what differs
    ("timm", "vit_base_patch32_clip_224", "vit_base_patch32_clip_quickgelu_224", "configuration"),
    ("timm", "vit_small_patch16_224.augreg_in1k", "vit_small_patch16_224.dino", "preprocessing"),
    ("open-clip", "ViT-B-32", "ViT-B-32-quickgelu", "configuration"),
]


@pytest.mark.extras
@pytest.mark.parametrize(("kind", "one", "two", "aspect"), DIFFERING)
def test_the_same_weights_under_another_configuration_are_another_encoder(
    kind: str, one: str, two: str, aspect: str
) -> None:
    first, second = built(type=kind, model=one), built(type=kind, model=two)
    assert not torch.equal(first(first.preprocess(IMAGES)), second(second.preprocess(IMAGES)))
    assert identity.weights_of(first.fingerprint) == identity.weights_of(second.fingerprint)
    assert aspect in identity.differing(first.fingerprint, second.fingerprint)
    assert first.fingerprint == built(type=kind, model=one).fingerprint
