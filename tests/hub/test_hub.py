"""Test loading pretrained models: what cannot be loaded is one message that names it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import ViTConfig, ViTForImageClassification

from mllm.encoders.vision import VisionModel
from mllm.errors import MLLMError
from mllm.hub import embedded as parts
from mllm.hub import loading as hub
from mllm.hub.fingerprints import fingerprint, tensor_hash
from mllm.lms.language_model import LanguageModel


@pytest.fixture
def encoder(tiny_parts: tuple[str, str], tmp_path: Path) -> Path:
    """Return a copy of the tiny encoder, which a test may damage."""
    return Path(shutil.copytree(tiny_parts[0], tmp_path / "encoder"))


def test_names_of_parts(tiny_parts: tuple[str, str]) -> None:
    assert hub.resolve(tiny_parts[0], "encoders") == tiny_parts[0]
    assert hub.resolve("openai/clip-vit-base-patch32", "encoders") == "openai/clip-vit-base-patch32"
    for name, message in (
        ("mllm/mobilnet-v2", "Did you mean 'mllm/mobilenet-v2'"),
        ("mllm/mobilenet-v2", "is not installed.*mllm parts install mllm/mobilenet-v2"),
        ("mllm/smollm2-135m", "one of the lms; expected one of the encoders"),
        ("./nowhere", "There is no folder './nowhere'"),
        ("~/nowhere", "There is no folder '~/nowhere'"),
    ):
        with pytest.raises(MLLMError, match=message):
            hub.resolve(name, "encoders")


@pytest.mark.installed
def test_installed_part_is_its_folder(need: Callable[..., None]) -> None:
    need("mllm/mobilenet-v2")
    assert hub.resolve("mllm/mobilenet-v2", "encoders") == str(parts.locate("mllm/mobilenet-v2"))


@pytest.mark.parametrize("cls", [VisionModel, LanguageModel])
def test_unreachable_hub_id_is_one_message(cls: type[VisionModel | LanguageModel]) -> None:
    with pytest.raises(MLLMError, match=r"'nobody/nothing' could not be loaded: .*mllm parts list") as caught:
        cls(model="nobody/nothing")
    assert "\n" not in str(caught.value)


def truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])


def reshape(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 7}))


@pytest.mark.parametrize(
    "damage",
    [
        truncate,
        reshape,
        lambda folder: (folder / "model.safetensors").unlink(),
        lambda folder: (folder / "config.json").unlink(),
        lambda folder: (folder / "config.json").write_text("{"),
        lambda folder: (folder / "config.json").write_text('{"model_type": "none-such"}'),
        lambda folder: (folder / "preprocessor_config.json").unlink(),
    ],
)
def test_damaged_folder_is_one_message(encoder: Path, damage: Callable[[Path], object]) -> None:
    VisionModel(model=str(encoder))
    damage(encoder)
    with pytest.raises(MLLMError, match=f"'{encoder}' could not be loaded: "):
        VisionModel(model=str(encoder))


def test_language_model_is_not_an_encoder(tiny_parts: tuple[str, str]) -> None:
    with pytest.raises(MLLMError):
        VisionModel(model=tiny_parts[1])
    with pytest.raises(MLLMError, match="could not be loaded"):
        LanguageModel(model=tiny_parts[0])


def test_the_hash_of_weight_files_depends_on_their_content_only(encoder: Path, tiny_parts: tuple[str, str]) -> None:
    same = fingerprint(str(encoder))
    assert same == fingerprint(tiny_parts[0]) != fingerprint(tiny_parts[1])
    file = encoder / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert fingerprint(str(encoder)) != same
    file.unlink()
    with pytest.raises(MLLMError, match="contains no weights"):
        fingerprint(str(encoder))


def test_tensor_hash_depends_on_values_names_and_dtypes() -> None:
    layer = torch.nn.Linear(2, 3)
    first = tensor_hash(layer)
    assert tensor_hash(layer) == first
    assert tensor_hash(torch.nn.Sequential(layer)) != first
    with torch.no_grad():
        layer.bias[1] += 1
    assert tensor_hash(layer) != first
    assert tensor_hash(torch.nn.Linear(2, 3).bfloat16()) != tensor_hash(torch.nn.Linear(2, 3))


def test_random_weights_come_from_the_seed_and_leave_the_generator_alone(tiny_parts: tuple[str, str]) -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    fingerprints = [VisionModel(model=tiny_parts[0], init="random", seed=seed).fingerprint for seed in (0, 0, 1)]
    assert fingerprints[0] == fingerprints[1] != fingerprints[2]
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize(
    ("cls", "part", "missing"), [(VisionModel, 0, "layernorm.weight"), (LanguageModel, 1, "down_proj")]
)
def test_a_missing_tensor_is_not_initialized_randomly(
    cls: type[VisionModel | LanguageModel], part: int, missing: str, tiny_parts: tuple[str, str], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_parts[part], tmp_path / "part"))
    tensors = load_file(folder / "model.safetensors")
    name = next(key for key in tensors if missing in key)
    del tensors[name]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(MLLMError, match=f"lacks 1 of the model's tensors: .*{missing}"):
        cls(model=str(folder))


def test_a_classifiers_missing_pooler_is_removed(tiny_parts: tuple[str, str], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_parts[0], tmp_path / "classifier"))
    ViTForImageClassification(ViTConfig.from_pretrained(folder)).save_pretrained(folder)
    pixels = torch.randn(2, 3, 32, 32)
    patches = VisionModel(model=str(folder))(pixels)
    torch.testing.assert_close(VisionModel(model=str(folder), select="pooled")(pixels)[:, 0], patches.mean(1))
