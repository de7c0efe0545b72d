"""Test vision encoders: every family's features equal the whole model's, and unused layers are dropped."""

from __future__ import annotations

import gc
import inspect
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModel

from mllm.build import encoder_of
from mllm.config.messages import checked
from mllm.config.parts import EncoderSpec
from mllm.encoders.truncate import run_truncated, truncate
from mllm.errors import MLLMError
from mllm.testing import ENCODER_FAMILIES, tiny_image

IMAGES = [tiny_image(1), tiny_image(2, (30, 60))]
GRIDS = {"swin": 2, "swinv2": 2} | dict.fromkeys(["pvt-v2", "segformer", "convnext", "dinov3-convnext"], 2)
NOT_TRUNCATED = ("pvt-v2",)  # no module returns its hidden states, so it cannot be truncated
GRIDS |= dict.fromkeys(["resnet", "regnet", "mobilenet-v2"], 2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """Return a function that returns the folder of a family's tiny model, which is saved once."""
    folders: dict[str, str] = {}

    def of(family: str) -> str:
        if family not in folders:
            folders[family] = ENCODER_FAMILIES[family](tmp_path_factory.mktemp(family))
        return folders[family]

    return of


def built(**values: Any) -> Any:
    return encoder_of(checked(EncoderSpec, values), seed=0)


def reference_output(encoder: Any, folder: str, pixels: Tensor) -> Any:
    """Return the output of the whole model of `transformers`."""
    model = AutoModel.from_pretrained(folder).eval()
    options = {key: value for key, value in encoder._constant_inputs.items() if not isinstance(value, Tensor)}
    if "spatial_shapes" in encoder._constant_inputs:  # the further inputs of SigLIP 2
        options["spatial_shapes"] = torch.tensor([[encoder.grid[0]] * 2] * len(pixels))
        options["pixel_attention_mask"] = torch.ones(len(pixels), pixels.shape[1], dtype=torch.int32)
    if "noise" in inspect.signature(model.forward).parameters:
        model.config.mask_ratio = 0.0
        options["noise"] = torch.arange(16).repeat(len(pixels), 1).float()
    with torch.no_grad():
        return model(pixels, output_hidden_states=True, **options)


def size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("family", ENCODER_FAMILIES)
def test_a_tiny_model_of_each_family_is_made_at_once(family: str, tmp_path: Path) -> None:
    started = time.monotonic()
    folder = ENCODER_FAMILIES[family](tmp_path / family)
    assert time.monotonic() - started < 3, "takes 0.1 s on an idle core"
    assert {"config.json", "model.safetensors", "preprocessor_config.json"} <= {p.name for p in Path(folder).iterdir()}


@pytest.mark.parametrize("family", ENCODER_FAMILIES)
def test_patches_are_those_of_the_whole_model_and_form_its_grid(family: str, folder: Callable[[str], str]) -> None:
    encoder = built(model=folder(family))
    side = GRIDS.get(family, 4)
    assert (encoder.grid, encoder.num_patches) == ((side, side), side * side)
    pixels = encoder.preprocess(IMAGES)
    features = encoder(pixels)
    hidden = reference_output(encoder, folder(family), pixels).last_hidden_state
    if hidden.ndim == 4:
        hidden = hidden.flatten(2).mT  # (B, P, D_vis)
    assert torch.equal(features, hidden[:, -side * side :])
    assert features.shape == (2, side * side, encoder.dim)
    assert features.std(0).mean() > 0.05, "different images give different features"
    alone = torch.cat([encoder(encoder.preprocess([image])) for image in IMAGES])
    torch.testing.assert_close(features, alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ENCODER_FAMILIES)
def test_a_tower_is_truncated_after_the_layer_with_bit_identical_output(
    family: str, folder: Callable[[str], str]
) -> None:
    whole = AutoModel.from_pretrained(folder(family))
    sizes = []
    for layer in (1, -2):
        encoder = built(model=folder(family), layer=layer, select="all")
        pixels = encoder.preprocess(IMAGES)
        expected = reference_output(encoder, folder(family), pixels).hidden_states[layer]
        if expected.ndim == 4:
            expected = expected.flatten(2).mT
        assert torch.equal(encoder(pixels), expected)
        assert (encoder._states == {}) == (family not in NOT_TRUNCATED), "whether the forward ends early"
        sizes.append(size(encoder))
    if family in NOT_TRUNCATED:
        return
    assert sizes[0] <= sizes[1] < size(whole)
    assert sizes[0] < sizes[1] or len(reference_output(encoder, folder(family), pixels).hidden_states) == 3


def test_a_truncated_model_keeps_the_used_weights_and_trains(folder: Callable[[str], str]) -> None:
    encoder = built(model=folder("vit"), layer=2)
    names = {name.split(".")[2] for name, _ in encoder.named_parameters() if ".layers." in name}
    remaining = [name for name, _ in encoder.named_parameters()]
    assert not any("pooler" in name or "layernorm.weight" in name for name in remaining), names
    features = encoder.requires_grad_(True)(encoder.preprocess(IMAGES))
    features.sum().backward()
    without_gradient = [name for name, parameter in encoder.named_parameters() if parameter.grad is None]
    assert all("mask_token" in name for name in without_gradient)


def test_truncation_keeps_no_tensor_of_its_trial_run() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Tanh(), torch.nn.Linear(4, 4))
    tensors: list[weakref.ref[torch.Tensor]] = []
    watch = model[1].register_forward_hook(lambda _module, _inputs, output: tensors.append(weakref.ref(output)))
    output, ends = truncate(model, lambda: model[1](model[0](torch.randn(2, 4))))
    watch.remove()
    gc.collect()
    assert ends and output.shape == (2, 4)
    assert [tensor() for tensor in tensors] == [None]


def test_truncation_handles_modules_that_run_twice_or_in_place() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shared, self.activation, self.unused = nn.Linear(3, 3), nn.ReLU(inplace=True), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.activation(self.shared(self.shared(x)))

    model, x = Twice(), torch.randn(2, 3)
    expected = model(x)
    output, ends = truncate(model, lambda: model(x))
    assert torch.equal(output, expected) and ends
    assert torch.equal(run_truncated(lambda: model(x)), expected)
    assert isinstance(model.unused, nn.Identity)
    inner = Twice()
    output, ends = truncate(inner, lambda: inner(x) + 1)  # no module returns this
    assert not ends and torch.equal(run_truncated(lambda: inner(x) + 1), output)


@pytest.mark.parametrize("family", ["clip", "siglip", "vit", "dinov2", "resnet"])
def test_pooled_is_the_models_pooler_output(family: str, folder: Callable[[str], str]) -> None:
    encoder = built(model=folder(family), select="pooled")
    pixels = encoder.preprocess(IMAGES)
    expected = reference_output(encoder, folder(family), pixels).pooler_output.flatten(1)
    torch.testing.assert_close(encoder(pixels)[:, 0], expected)  # torch's attention uses another kernel when frozen
    assert (encoder.num_patches, encoder.grid) == (1, None)


@pytest.mark.parametrize(("family", "extra"), [("clip", 1), ("dinov2-registers", 5), ("dinov3", 5), ("siglip", 0)])
def test_cls_and_registers_are_counted(family: str, extra: int, folder: Callable[[str], str]) -> None:
    every, patches = (built(model=folder(family), select=select) for select in ("all", "patches"))
    assert every.num_patches == 16 + extra
    assert every.grid == (None if extra else (4, 4))
    pixels = every.preprocess(IMAGES)
    assert torch.equal(every(pixels)[:, extra:], patches(pixels))
    mean = built(model=folder(family), select="pooled", layer=-1)
    last = built(model=folder(family), layer=-1)
    torch.testing.assert_close(mean(pixels)[:, 0], last(pixels).mean(1))


INTERPOLATED = [
    "clip",
    "siglip",
    "siglip2-naflex",
    "dinov2",
    "dinov2-registers",
    "dinov3",
    "vit",
    "beit",
    "vit-mae",
    "deit",
]


@pytest.mark.parametrize("family", [*INTERPOLATED, "ijepa"])
def test_positions_are_interpolated_to_another_resolution(family: str, folder: Callable[[str], str]) -> None:
    encoder = built(model=folder(family), resolution=48)
    assert encoder.grid == (6, 6)
    pixels = encoder.preprocess(IMAGES)
    features = encoder(pixels)
    if family != "vit-mae":
        expected = reference_output(encoder, folder(family), pixels).last_hidden_state
        assert torch.equal(features, expected[:, -36:])
    assert features.shape == (2, 36, 24)


@pytest.mark.parametrize("family", ["swin", "convnext", "resnet", "mobilenet-v2"])
def test_models_without_positions_take_any_resolution(family: str, folder: Callable[[str], str]) -> None:
    small, large = (built(model=folder(family), resolution=side) for side in (64, 128))
    assert large.num_patches == 4 * small.num_patches


def test_a_stretched_image_is_whole(folder: Callable[[str], str]) -> None:
    encoder = built(model=folder("clip"), resize="stretch")
    square = {"height": 32, "width": 32}
    expected = encoder.processor(images=IMAGES, size=square, do_center_crop=False, return_tensors="pt")
    assert torch.equal(encoder.preprocess(IMAGES), expected["pixel_values"])


def test_random_weights_are_a_control_with_another_fingerprint(folder: Callable[[str], str]) -> None:
    pretrained, random, again = (built(model=folder("vit"), init=i) for i in ("pretrained", "random", "random"))
    truncated = built(model=folder("vit"), init="random", layer=1)
    pixels = random.preprocess(IMAGES)
    assert torch.equal(random(pixels), again(pixels)) and not torch.equal(random(pixels), pretrained(pixels))
    assert random.fingerprint == again.fingerprint == truncated.fingerprint != pretrained.fingerprint


def test_a_masked_autoencoder_masks_nothing(folder: Callable[[str], str]) -> None:
    encoder = built(model=folder("vit-mae"))
    pixels = encoder.preprocess(IMAGES)
    assert torch.equal(encoder(pixels), encoder(pixels))


WRONG = [
    ("vit", {"layer": 9}, "encoder.layer is 9, but the encoder has 4 hidden states: give a number from -4 to 3"),
    ("vit", {"resolution": 50}, "encoder.resolution is 50, but the encoder's patches are 8 pixels wide.*48 or 56"),
    ("vit", {"resolution": 5}, "set a multiple, 8"),
    ("vit", {"resolutoin": 5}, "unexpected keyword argument 'resolutoin'.* Did you mean 'resolution'"),
    ("pvt-v2", {"resolution": 1}, "does not accept images of 1 x 1 pixels.*Leave out encoder.resolution"),
]


@pytest.mark.parametrize("meta", [False, True])
@pytest.mark.parametrize(("family", "values", "message"), WRONG)
def test_unsupported_settings_are_refused_on_the_meta_device_too(
    family: str, values: dict[str, Any], message: str, meta: bool, folder: Callable[[str], str]
) -> None:
    path = folder(family)
    with pytest.raises(MLLMError, match=message), torch.device("meta" if meta else "cpu"):
        built(model=path, **values)


@pytest.mark.parametrize("family", ENCODER_FAMILIES)
def test_shapes_on_the_meta_device_are_the_real_ones(family: str, folder: Callable[[str], str]) -> None:
    path = folder(family)
    with torch.device("meta"):
        on_meta = built(model=path, layer=-2)
    real = built(model=path, layer=-2)
    assert (on_meta.dim, on_meta.grid, on_meta.num_patches, size(on_meta)) == (
        real.dim,
        real.grid,
        real.num_patches,
        size(real),
    )
    assert {parameter.device.type for parameter in on_meta.parameters()} == {"meta"}
