"""Export of models that cut images into tiles: ids, pixels and logits are the classes', for images of any size."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from transformers import (
    AutoImageProcessor,
    AutoProcessor,
    AutoTokenizer,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    InternVLForConditionalGeneration,
    InternVLVisionConfig,
    InternVLVisionModel,
    LlavaNextForConditionalGeneration,
    LlavaOnevisionForConditionalGeneration,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTImageProcessorPil,
    pipeline,
)

import mllm
from mllm.errors import MLLMError
from mllm.export.export import export
from mllm.export.processors import images_alone, read_processor
from mllm.testing import ENCODER_FAMILIES, tiny_lm
from mllm.testing.lms import spread

SIDE = 32
SHAPE: dict[str, Any] = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 48}
SQUARE = {"height": SIDE, "width": SIDE}
SIZES = [(97, 33), (40, 31), (64, 64), (20, 90), (300, 200), (200, 200), (1, 1), (200, 2), (33, 32), (250, 60)]
RANDOM = np.random.default_rng(0)
IMAGES = [Image.fromarray(RANDOM.integers(0, 256, (height, width, 3), dtype=np.uint8)) for width, height in SIZES]

TOWERS: dict[str, tuple[Any, Any]] = {
    "clip": (
        lambda: CLIPVisionModel(CLIPVisionConfig(**SHAPE, image_size=SIDE, patch_size=8)),
        CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=SQUARE),
    ),
    "siglip": (
        lambda: SiglipVisionModel(SiglipVisionConfig(**SHAPE, image_size=SIDE, patch_size=8)),
        SiglipImageProcessorPil(size=SQUARE),
    ),
    "internvit with a last normalization": (
        lambda: InternVLVisionModel(
            InternVLVisionConfig(**SHAPE, image_size=[SIDE, SIDE], patch_size=[8, 8], use_mean_pooling=False)
        ),
        ViTImageProcessorPil(size=SQUARE),
    ),
    "internvit": (
        lambda: InternVLVisionModel(InternVLVisionConfig(**SHAPE, image_size=[SIDE, SIDE], patch_size=[8, 8])),
        ViTImageProcessorPil(size=SQUARE, resample=3, image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.3, 0.25]),
    ),
}
SHUFFLED = {"type": "mlp", "shuffle": 2, "input_norm": True}
CASES: dict[str, tuple[str, str, dict[str, Any], Any]] = {
    "LLaVA-NeXT": ("hf-llava-next", "clip", {"layer": -2, "tiles": {"kind": "anyres"}}, "mlp"),
    "every token, other grids": (
        "hf-llava-next",
        "siglip",
        {"layer": -1, "tiles": {"kind": "anyres", "grids": [[1, 1], [1, 4], [3, 2]]}},
        "linear",
    ),
    "LLaVA-OneVision": (
        "hf-llava-onevision",
        "siglip",
        {"layer": -1, "tiles": {"kind": "anyres", "grids": 6, "limit": 9}},
        "mlp",
    ),
    "a smaller limit": (
        "hf-llava-onevision",
        "clip",
        {"layer": -2, "tiles": {"kind": "anyres", "grids": 4, "limit": 2}},
        "mlp",
    ),
    "InternVL": ("hf-internvl", "internvit", {"layer": -1, "tiles": {"kind": "dynamic", "most": 6}}, SHUFFLED),
    "an output after a normalization": (
        "hf-internvl",
        "internvit with a last normalization",
        {"tiles": {"kind": "dynamic", "least": 2, "most": 4}},
        {**SHUFFLED, "shuffle": 4},
    ),
}
CLASSES: dict[str, Any] = {
    "hf-llava-next": LlavaNextForConditionalGeneration,
    "hf-llava-onevision": LlavaOnevisionForConditionalGeneration,
    "hf-internvl": InternVLForConditionalGeneration,
}


def tower(folder: Path, kind: str) -> str:
    """Save a tiny vision tower with random weights, and its image processor."""
    build, processor = TOWERS[kind]
    model = build()
    spread(model, 0.1)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module", params=CASES)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path, str]:
    """A model, the folder that it is exported to, and the format."""
    folder = tmp_path_factory.mktemp("case")
    to, kind, encoder, connector = CASES[request.param]
    lm = tiny_lm(folder / "lm", context=4096)
    model: Any = mllm.assemble({"model": tower(folder / "tower", kind), **encoder}, lm, connector, device="cpu")
    spread(model.connector, 0.1)
    results = export(model, folder / "out", to=to)
    assert all(one.difference <= 1e-5 * one.largest and one.tokens == one.stock for one in results)
    return model, folder / "out", to


@torch.no_grad()
def test_images_of_any_size_are_those_of_the_class(exported: tuple[Any, Path, str]) -> None:
    model, folder, to = exported
    stock = CLASSES[to].from_pretrained(folder).eval()
    processor = read_processor_of(folder)
    for number, image in enumerate(IMAGES):
        pieces = ["See ", image, " and ", IMAGES[number - 1], ". It is"]
        inputs = processor(
            images=[image, IMAGES[number - 1]], text="See <image> and <image>. It is", return_tensors="pt"
        )
        encoded = model.encode(pieces)
        ids = [processor.image_token_id if v else i for i, v in zip(encoded.ids, encoded.visual, strict=True)]
        assert ids == inputs["input_ids"][0].tolist()
        embeds, batch = model.prepare([pieces])
        mine = model.lm.logits(embeds, batch.mask)[0]
        theirs = stock(**inputs).logits[0, :, : mine.shape[1]]
        torch.testing.assert_close(theirs, mine, atol=1e-5 * float(mine.abs().max()), rtol=0)


@torch.no_grad()
def test_the_usual_chat_call_answers_as_the_model_does(exported: tuple[Any, Path, str]) -> None:
    """In a padded batch, with one image in each conversation; the probes of the export have several, too."""
    model, folder, to = exported
    stock = CLASSES[to].from_pretrained(folder).eval()
    processor = read_processor_of(folder)
    images = IMAGES[:3]
    chats = [
        [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "What?"}]}]
        for image in images
    ]
    inputs = processor.apply_chat_template(
        chats,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True},
    )
    answers = stock.generate(**inputs, max_new_tokens=6)[:, inputs["input_ids"].shape[1] :]
    texts = processor.batch_decode(answers, skip_special_tokens=True)
    assert [text.strip() for text in texts] == [model.chat().send("What?", [i], max_new_tokens=6) for i in images]


def read_processor_of(folder: Path) -> Any:
    """Return the folder's processor with PIL images; the class is the one that the folder names."""
    name = json.loads((folder / "processor_config.json").read_text())["processor_class"]
    kind = getattr(transformers, name)
    return read_processor(folder, kind if name == "LlavaNextProcessor" else images_alone(kind))


def test_the_files_are_those_that_auto_classes_read(exported: tuple[Any, Path, str]) -> None:
    """The image processor and the tokenizer by themselves; the video processor is named, and needs torchvision."""
    _, folder, to = exported
    images = AutoImageProcessor.from_pretrained(folder, backend="pil")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    values = json.loads((folder / "processor_config.json").read_text())
    kinds = {
        "hf-llava-next": ("LlavaNextImageProcessorPil", "LlavaNextProcessor", None),
        "hf-llava-onevision": (
            "LlavaOnevisionImageProcessorPil",
            "LlavaOnevisionProcessor",
            "LlavaOnevisionVideoProcessor",
        ),
        "hf-internvl": ("GotOcr2ImageProcessorPil", "InternVLProcessor", "InternVLVideoProcessor"),
    }
    video = values.get("video_processor", {}).get("video_processor_type")
    assert (type(images).__name__, values["processor_class"], video) == kinds[to]
    assert tokenizer.convert_tokens_to_ids("<image>") == json.loads((folder / "config.json").read_text()).get(
        "image_token_id" if to == "hf-internvl" else "image_token_index"
    )


def test_the_card_says_what_is_not_equal(exported: tuple[Any, Path, str]) -> None:
    _, folder, to = exported
    card = (folder / "README.md").read_text()
    assert ("Of several images it encodes each as a whole" in card.replace("\n", " ")) == (to == "hf-llava-onevision")
    assert ("needs torchvision" in card) == (to != "hf-llava-next")
    probes = json.loads((folder / "probes" / "probes.json").read_text())
    assert all((folder / name).is_file() for probe in probes for name in probe["images"])
    assert len({name for probe in probes for name in probe["images"]}) == 3


@pytest.mark.extras
def test_with_torchvision_the_folder_is_read_by_auto_classes_alone(exported: tuple[Any, Path, str]) -> None:
    model, folder, _ = exported
    processor = AutoProcessor.from_pretrained(folder)
    for image in IMAGES:
        encoded = model.encode([image, " it is"])
        inputs = processor(images=[image], text="<image> it is", return_tensors="pt")
        ids = [processor.image_token_id if v else i for i, v in zip(encoded.ids, encoded.visual, strict=True)]
        assert inputs["input_ids"][0].tolist() == ids
        pixels = model.encoder.preprocess(model.encoder.tiles(image))
        assert (inputs["pixel_values"].flatten(0, -4) - pixels).abs().mean() < 0.02  # torchvision resizes otherwise
    content = [{"type": "image", "image": IMAGES[0]}, {"type": "text", "text": "What?"}]
    answer: Any = pipeline("image-text-to-text", model=str(folder))
    texts = answer(text=[{"role": "user", "content": content}], max_new_tokens=4, return_full_text=False)
    assert isinstance(texts[0]["generated_text"], str)


DYNAMIC, ANYRES = {"kind": "dynamic"}, {"kind": "anyres"}
REFUSED: list[tuple[str, dict[str, Any], Any, str]] = [
    ("hf-llava", {"tiles": ANYRES}, "mlp", "hf-llava-next, hf-llava-onevision and hf-internvl"),
    ("hf-llava-next", {}, "mlp", r"as a whole \(encoder.tiles is not set\).*encoder.tiles.kind=anyres"),
    ("hf-llava-next", {"tiles": DYNAMIC}, "mlp", "kind=dynamic; this class .* any resolution"),
    ("hf-llava-next", {"tiles": {"kind": "split"}}, "mlp", "kind=split"),
    ("hf-llava-next", {"tiles": {**ANYRES, "unpad": False}}, "mlp", "unpad=false"),
    ("hf-llava-next", {"tiles": {**ANYRES, "limit": 4}}, "mlp", "those of 4 tiles .*hf-llava-onevision"),
    ("hf-llava-next", {"tiles": ANYRES, "resolution": 48}, "mlp", "cannot be this class's vision tower"),
    ("hf-llava-next", {"tiles": ANYRES}, {"type": "mlp", "shuffle": 2}, "reduces the patches"),
    ("hf-llava-next", {"tiles": ANYRES}, {"type": "mlp", "input_norm": True}, "connector.input_norm"),
    ("hf-llava-onevision", {"tiles": ANYRES}, "mlp", "never reduced.*hf-llava-next"),
    ("hf-internvl", {"tiles": ANYRES}, SHUFFLED, "dynamic resolution"),
    ("hf-internvl", {"tiles": DYNAMIC}, "mlp", "input_norm"),
    ("hf-internvl", {"tiles": DYNAMIC}, {**SHUFFLED, "depth": 3}, "depth"),
    ("hf-internvl", {"tiles": DYNAMIC}, SHUFFLED, "CLIPVisionModel; this class has InternVL's"),
    ("hf-internvl", {"tiles": DYNAMIC}, {**SHUFFLED, "tokens": 1}, "reduces the patches"),
]


@pytest.mark.parametrize(("to", "encoder", "connector", "reason"), REFUSED)
def test_what_a_class_does_not_have_is_refused(
    tiny_clip: str, tiny_parts: Any, tmp_path: Path, to: str, encoder: dict[str, Any], connector: Any, reason: str
) -> None:
    model: Any = mllm.assemble({"model": tiny_clip, "layer": -1, **encoder}, tiny_parts[1], connector, device="cpu")
    with pytest.raises(MLLMError, match=f"(?s)not equivalent to {to}.*{reason}"):
        export(model, tmp_path / "out", to=to)
    assert not any(tmp_path.iterdir())


def test_a_context_too_short_for_any_image_is_one_message(tiny_clip: str, tmp_path: Path) -> None:
    encoder = {"model": tiny_clip, "layer": -1, "tiles": ANYRES}
    model: Any = mllm.assemble(encoder, tiny_lm(tmp_path / "lm", context=24), "mlp", device="cpu")
    with pytest.raises(MLLMError, match="context of 24 tokens is too short for the tiles"):
        export(model, tmp_path / "out", to="hf-llava-next")


def test_tiles_that_are_not_as_wide_as_the_towers_images_are_refused(tiny_parts: Any, tmp_path: Path) -> None:
    """DINOv2 interpolates its positions, and the class would compute rows for the size in the configuration."""
    encoder = {"model": ENCODER_FAMILIES["dinov2"](tmp_path / "dinov2"), "layer": -1, "tiles": ANYRES}
    model: Any = mllm.assemble({**encoder, "resolution": 48}, tiny_parts[1], "mlp", device="cpu")
    with pytest.raises(MLLMError, match=r"48 pixels wide .* \(32, 32\).*leave out encoder.resolution"):
        export(model, tmp_path / "out", to="hf-llava-next")
    export(mllm.assemble(encoder, tiny_lm(tmp_path / "lm", context=900), "mlp"), tmp_path / "out", to="hf-llava-next")
