"""Export: the folder, loaded by transformers alone, equals the model; a model that is not equivalent is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from transformers import (
    AutoImageProcessor,
    AutoProcessor,
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2QFormerConfig,
    Blip2VisionConfig,
    CLIPImageProcessorPil,
    LlavaForConditionalGeneration,
    LlavaImageProcessorPil,
    OPTConfig,
    SiglipImageProcessorPil,
    ViTImageProcessorPil,
)
from typer.testing import CliRunner

import mllm
from mllm.cli.app import app
from mllm.errors import MLLMError
from mllm.export.export import export
from mllm.export.images import image_processor
from mllm.lms.decoding import Decoding
from mllm.testing import LM_FAMILIES, tiny_encoder, tiny_image
from mllm.testing.lms import LMFamily, spread

QFORMER = {"type": "qformer", "tokens": 4, "dim": 16, "layers": 2, "heads": 2}
IMAGES = [tiny_image(seed) for seed in range(2)]


def moved(model: Any) -> Any:
    """Return the model with noise on its trained weights, since adapters start without effect."""
    torch.manual_seed(1)
    for parameter in [*model.connector.parameters(), *model.adapters.parameters()]:
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


@torch.no_grad()
def same_answers(model: Any, folder: Path, cls: Any, text: str = " what is it?") -> None:
    """Compare a batch of the transformers class with the model: logits to 1e-5, and greedy tokens."""
    stock = cls.from_pretrained(folder).eval()
    inputs = AutoProcessor.from_pretrained(folder, backend="pil")(
        images=IMAGES, text=["<image>" + text] * 2, return_tensors="pt"
    )
    embeds, batch = model.prepare([[source, text] for source in IMAGES])
    mine = model.lm.logits(embeds, batch.mask)
    theirs = stock(**inputs).logits[..., : mine.shape[-1]]
    torch.testing.assert_close(theirs, mine, atol=1e-5 * float(mine.abs().max()), rtol=0)
    rows = stock.generate(**inputs, max_new_tokens=8, min_new_tokens=8)[:, batch.ids.shape[1] :]
    prompt = tuple(torch.where(batch.visual, -1, batch.ids)[0].tolist())
    decoding = Decoding(max_new_tokens=8, generation={"min_new_tokens": 8}, prompt=prompt)
    assert rows.tolist() == model.lm.generate(batch.mask, [decoding] * 2, inputs_embeds=embeds)


@pytest.mark.parametrize(
    ("encoder", "connector"),
    [
        ({"layer": -1}, "mlp"),
        ({"layer": -2}, "linear"),
        ({"layer": 1, "select": "all"}, {"type": "mlp"}),
    ],
)
def test_tower_map_and_decoder_are_llava(tiny_clip, tiny_parts, tmp_path, encoder, connector):
    model = moved(mllm.assemble({"model": tiny_clip, **encoder}, tiny_parts[1], connector))
    results = export(model, tmp_path / "out", to="hf-llava")
    assert len(results) == 6  # three prompts, three conversations
    assert all(one.difference <= 1e-5 * one.largest and one.tokens == one.stock for one in results)
    same_answers(model, tmp_path / "out", LlavaForConditionalGeneration)


@pytest.mark.parametrize(
    ("resize", "resolution"), [("stretch", None), ("crop", None), ("pad", None), (None, None), (None, 48)]
)
@pytest.mark.parametrize("processor", ["CLIP", "CLIP-a-part", "SigLIP", "LLaVA"])
def test_exported_images_become_squares_as_in_training(tiny_clip, tiny_parts, tmp_path, resize, resolution, processor):
    square = {"height": 32, "width": 32}
    {
        "CLIP": CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=square),
        "CLIP-a-part": CLIPImageProcessorPil(size={"shortest_edge": 37}, crop_size=square),
        "SigLIP": SiglipImageProcessorPil(size=square),
        "LLaVA": LlavaImageProcessorPil(size={"shortest_edge": 32}, crop_size=square, do_pad=True),
    }[processor].save_pretrained(shutil.copytree(tiny_clip, tmp_path / "clip"))
    encoder = {"model": str(tmp_path / "clip"), "layer": -1, "resize": resize, "resolution": resolution}
    model = moved(mllm.assemble(encoder, tiny_parts[1], "linear"))
    image_processor(model).save_pretrained(tmp_path / "out")
    loaded = AutoImageProcessor.from_pretrained(tmp_path / "out", backend="pil")
    images = [tiny_image(3, (97, 33)), tiny_image(4, (20, 51))]
    assert torch.equal(loaded(images=images, return_tensors="pt")["pixel_values"], model.encoder.preprocess(images))


# The families that have embed_tokens and whose logits are one linear layer on the body's states; others are refused.
LLAVA = ("llama", "mistral", "mixtral", "qwen2", "qwen3", "gemma", "gemma3", "phi3", "olmo2", "stablelm", "smollm3")
REFUSED = {
    "opt": "embeddings are 24 wide",
    "gpt2": "embed_tokens",
    "gpt-neox": "embed_tokens",
    "bloom": "embed_tokens",
    "gpt-j": "more than one linear layer",
    "gemma2": "more than one linear layer",
}


@pytest.mark.parametrize("family", LLAVA)
def test_families_that_fit_llavas_class(tiny_clip, tmp_path, family):
    model = moved(mllm.assemble({"model": tiny_clip, "layer": -1}, LM_FAMILIES[family](tmp_path / "lm"), "linear"))
    export(model, tmp_path / "out", to="hf-llava")
    same_answers(model, tmp_path / "out", LlavaForConditionalGeneration)


@pytest.mark.parametrize("family", REFUSED)
def test_families_that_do_not_fit_llavas_class_are_refused(tiny_clip, tmp_path, family):
    model = mllm.assemble({"model": tiny_clip, "layer": -1}, LM_FAMILIES[family](tmp_path / "lm"), "mlp")
    with pytest.raises(MLLMError, match=REFUSED[family]):
        export(model, tmp_path / "out", to="hf-llava")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lm"]


def opt(folder: Path) -> str:
    """Save a tiny OPT whose embeddings are as wide as its body; the family's has a narrower table."""
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 64}
    return LMFamily("opt", {**shape, "max_position_embeddings": 256, "word_embed_proj_dim": 32}, start=True)(folder)


def test_opt_with_a_table_of_another_width_is_refused(tiny_parts, tmp_path):
    encoder = {"model": tiny_parts[0], "select": "all"}
    model = mllm.assemble(encoder, LM_FAMILIES["opt"](tmp_path / "lm"), {**QFORMER, "norm": False})
    with pytest.raises(MLLMError, match="embeddings are 24 wide, its body 32"):
        export(model, tmp_path / "out", to="hf-blip2")


@pytest.mark.parametrize("family", ["opt", "gpt2", "gpt-j", "llama"])
def test_vit_qformer_and_decoder_are_blip2(tiny_parts, tmp_path, family):
    encoder = {"model": tiny_parts[0], "select": "all"}
    lm = {**LM_FAMILIES, "opt": opt}[family](tmp_path / "lm")
    model = moved(mllm.assemble(encoder, lm, {**QFORMER, "norm": False}))
    export(model, tmp_path / "out", to="hf-blip2")
    same_answers(model, tmp_path / "out", Blip2ForConditionalGeneration)


def blip2(folder: Path, lm: str) -> str:
    """Save a tiny BLIP-2 with its image processor; its vision model is an encoder as it stands."""
    shape: dict[str, Any] = {
        "hidden_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 48,
    }
    config = Blip2Config(
        vision_config=Blip2VisionConfig(**shape, image_size=32, patch_size=8),
        qformer_config=Blip2QFormerConfig(**shape),
        text_config=OPTConfig.from_pretrained(lm),
        num_query_tokens=4,
    )
    model = Blip2ForConditionalGeneration(config)
    spread(model, 0.1)
    model.save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("layer", [None, -1, -2])
def test_blip2s_own_tower_goes_in_and_out(tmp_path, layer):
    lm = opt(tmp_path / "lm")
    encoder = {"model": blip2(tmp_path / "blip2", lm), "select": "all", "layer": layer}
    model = moved(mllm.assemble(encoder, lm, {**QFORMER, "norm": layer is not None}))
    export(model, tmp_path / "out", to="hf-blip2")
    same_answers(model, tmp_path / "out", Blip2ForConditionalGeneration)


def test_lora_is_merged_and_the_card_says_so(tiny_clip, tiny_parts, tmp_path):
    lora = {"type": "lora", "r": 4, "targets": ["q_proj", "up_proj"]}
    model = moved(mllm.assemble({"model": tiny_clip, "layer": -1}, tiny_parts[1], "mlp", adapters=[lora]))
    with model.adapters_off():
        bare = model.score([IMAGES[0], "a"], [" b"])
    assert model.score([IMAGES[0], "a"], [" b"]) != bare
    results = export(model, tmp_path / "out", to="hf-llava")
    assert max(one.difference / one.largest for one in results) < 1e-4
    assert "LoRA adapters were merged into the weights" in (tmp_path / "out" / "README.md").read_text()


def test_card_and_probes_have_the_comparison(tiny_clip, tiny_parts, tmp_path):
    run = moved(mllm.assemble({"model": tiny_clip, "layer": -1}, tiny_parts[1], "linear")).save(tmp_path / "run")
    done = CliRunner().invoke(app, ["export", str(run), str(tmp_path / "out"), "--to", "hf-llava"])
    assert done.exit_code == 0, done.output
    card = (tmp_path / "out" / "README.md").read_text()
    probes = json.loads((tmp_path / "out" / "probes" / "probes.json").read_text())
    worst = max(probe["difference"] for probe in probes)
    assert f"largest difference of any logit is {worst:.3g}" in card
    assert "| connector | linear |" in card
    assert str(tmp_path) not in card
    for probe in probes:
        assert probe["tokens"] == probe["stock"]
        assert all((tmp_path / "out" / name).is_file() for name in probe["images"])


def test_all_reasons_are_in_one_message(tiny_parts, tmp_path):
    encoder, lm = {"model": tiny_parts[0]}, tiny_parts[1]
    model = mllm.assemble(encoder, lm, {**QFORMER, "causal": True}, adapters=[{"type": "bottleneck"}])
    with pytest.raises(MLLMError) as error:
        export(model, tmp_path / "out", to="hf-llava")
    for reason in ("connector is 'qformer'", "not a hidden state", "'bottleneck' cannot be merged"):
        assert reason in str(error.value)
    with pytest.raises(MLLMError) as error:
        export(model, tmp_path / "out", to="hf-blip2")
    for reason in ("connector.causal", "encoder.select=all", "'bottleneck' cannot be merged"):
        assert reason in str(error.value)
    assert not any(tmp_path.iterdir())


def test_new_tokens_and_half_a_model_are_refused(tiny_clip, tiny_parts, tmp_path):
    model = mllm.assemble({"model": tiny_clip, "layer": -1}, tiny_parts[1], "linear", tokens=["[IMG]"])
    with pytest.raises(MLLMError, match=r"new tokens \(\[IMG\]\)"):
        export(model, tmp_path / "out", to="hf-llava")
    model.connector = None
    with pytest.raises(MLLMError, match="has no connector"):
        export(model, tmp_path / "out", to="hf-llava")


@pytest.mark.parametrize(
    ("connector", "reason"),
    [
        ({"type": "linear", "tokens": 4}, "reduces the patches"),
        ({"type": "mlp", "shuffle": 2}, "reduces the patches"),
        ({"type": "linear", "norm": True}, "LayerNorm"),
        ({"type": "mlp", "depth": 3}, "depth"),
        ({"type": "mlp", "hidden": 8}, "hidden"),
        ({"type": "mlp", "vocabulary": True}, r"expected word embeddings \(connector.vocabulary\)"),
    ],
)
def test_a_connector_that_llava_does_not_have_is_refused(tiny_clip, tiny_parts, tmp_path, connector, reason):
    model = mllm.assemble({"model": tiny_clip, "layer": -1}, tiny_parts[1], connector)
    with pytest.raises(MLLMError, match=reason):
        export(model, tmp_path / "out", to="hf-llava")


def test_expected_words_are_not_blip2_and_unchanged_tokens_are(tiny_parts, tmp_path):
    encoder, lm = {"model": tiny_parts[0], "select": "all"}, opt(tmp_path / "lm")
    words = {**QFORMER, "norm": False, "vocabulary": True}
    with pytest.raises(MLLMError, match=r"connector.vocabulary"):
        export(mllm.assemble(encoder, lm, words), tmp_path / "out", to="hf-blip2")
    tokens = {**words, "vocabulary": {"output": "tokens"}}
    export(moved(mllm.assemble(encoder, lm, tokens)), tmp_path / "out", to="hf-blip2")


def test_blip2_normalises_once(tiny_parts, tmp_path):
    for encoder, norm in [({}, True), ({"layer": -1}, False), ({"layer": -1}, True)]:  # the last: another epsilon
        model = mllm.assemble(
            {"model": tiny_parts[0], "select": "all", **encoder}, tiny_parts[1], {**QFORMER, "norm": norm}
        )
        with pytest.raises(MLLMError, match="normalizes once"):
            export(model, tmp_path / "out", to="hf-blip2")


def test_a_difference_is_refused_and_leaves_nothing(tiny_clip, tiny_parts, tmp_path, monkeypatch):
    model = mllm.assemble({"model": tiny_clip, "layer": -1}, tiny_parts[1], "linear")
    model.connector.register_forward_hook(
        lambda module, args, output: output + 0.1
    )  # that no check of the parts can notice
    with pytest.raises(MLLMError, match="The transformers class differs"):
        export(model, tmp_path / "out", to="hf-llava")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("No space left on device")])
def test_a_full_disk_is_one_message_and_leaves_nothing(tiny_clip, tiny_parts, tmp_path, monkeypatch, error):
    def full(self: Any, folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        raise error

    monkeypatch.setattr(LlavaForConditionalGeneration, "save_pretrained", full)
    model = mllm.assemble({"model": tiny_clip, "layer": -1}, tiny_parts[1], "linear")
    with pytest.raises(MLLMError, match=r"could not be written: .*No space left.*Free some space"):
        export(model, tmp_path / "out", to="hf-llava")
    assert not any(tmp_path.iterdir())


def test_an_existing_folder_is_not_overwritten(tiny_parts, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("kept")
    model = mllm.assemble(*tiny_parts)
    with pytest.raises(MLLMError, match="exists already"):
        export(model, tmp_path / "out", to="hf-llava")
    with pytest.raises(MLLMError, match="Did you mean 'hf-llava'"):
        export(model, tmp_path / "new", to="hf-lava")
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "mine"]


def test_vit_is_a_tower_of_llava_only_before_its_last_normalisation(tmp_path, tiny_parts):
    vit = tiny_encoder(tmp_path / "vit")
    export(moved(mllm.assemble({"model": vit, "layer": -1}, tiny_parts[1])), tmp_path / "out", to="hf-llava")
    with pytest.raises(MLLMError, match="last normalization"):
        export(mllm.assemble(vit, tiny_parts[1]), tmp_path / "other", to="hf-llava")
