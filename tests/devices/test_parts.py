"""Every kind of part computes on the device what it computes on the CPU; tensors of the two never meet."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import mllm
from mllm.config.fit import ObjectiveSpec
from mllm.data.items import Item
from mllm.fits.affine import AffineFit
from mllm.fits.base import Material
from mllm.fits.connector import ConnectorFit
from mllm.fits.decision import DecisionFit
from mllm.fits.pixels import PixelsFit
from mllm.fits.retrieval import RetrievalFit
from mllm.media.images import source_of
from mllm.media.sounds import Sound
from mllm.media.videos import Clip
from mllm.objectives.build import objectives_of
from mllm.outputs import ImagePart
from mllm.prompts.pieces import Target
from mllm.scorers.index import ImageIndex
from mllm.testing import AUDIO_FAMILIES, ENCODER_FAMILIES, LM_FAMILIES, tiny_image, tiny_tokenizer
from mllm.training.batches import inputs

A, B = tiny_image(1), tiny_image(2)
PROMPTS = [[A, "AAA"], [B, "A"], ["only text"]]
ROWS = [
    [A, "A picture of", Target(" a cat")],
    [B, "A picture of", Target(" two red birds")],
]
ITEMS = [Item(str(n), (source_of(tiny_image(n)),), (f"thing {n * n}",)) for n in range(6)]

CONNECTORS: dict[str, dict[str, Any]] = {
    "linear": {"type": "linear", "tokens": 4, "norm": True},
    "mlp": {"type": "mlp", "shuffle": 2},
    "mapper": {"type": "mapper", "tokens": 3, "dim": 16, "layers": 1, "heads": 2, "ffn": 16},
    "resampler": {"type": "resampler", "tokens": 3, "depth": 1, "heads": 2},
    "qformer": {"type": "qformer", "tokens": 3, "dim": 16, "layers": 2, "heads": 2, "causal": True},
    "temporal": {"type": "temporal", "frames": 4, "dim": 16, "heads": 2},
    "token-merge": {"type": "token-merge", "merge": 3, "layers": 2, "dim": 16, "heads": 2},
}
ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {"type": "lora", "r": 2},
    "dora": {"type": "lora", "r": 2, "dora": True},
    "bottleneck": {"type": "bottleneck"},
    "prompt": {"type": "prompt", "positions": 3},
    "prefix": {"type": "prefix", "positions": 3},
    "gated": {"type": "gated", "every": 1, "heads": 2, "head_dim": 8},
}


@pytest.fixture(autouse=True)
def _in_the_precision_of_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compute in float32 on the device, too: it is compared with the CPU."""
    monkeypatch.setattr("mllm.build.computes_in_bfloat16", lambda _: False)


def condition_head(kind: str, **options: Any) -> dict[str, Any]:
    sizes = {"generation": {"dim": 16, "layers": 1, "heads": 2}, "aligner": {"layers": 1, "heads": 2}}
    return {"type": kind, "tokens": 1, "length": 1, "width": 32, **sizes.get(kind, {}), **options}


HEADS: dict[str, dict[str, Any]] = {
    "generation": condition_head("generation"),
    "affine": condition_head("affine"),
    "bridge": {"type": "bridge", "tokens": 1, "width": 32},
    "aligner": condition_head("aligner"),
}


def both(assembled: Any, **options: Any) -> tuple[Any, Any]:
    """Return the model on the CPU and on the device."""
    return assembled(device="cpu", **options), assembled(**options)


def on_device(model: Any) -> bool:
    return {p.device.type for p in (*model.parameters(), *model.buffers())} == {"cuda"}


def answers(model: Any, **decoding: Any) -> list[str]:
    view = model.see([A])
    chat = model.chat()
    return [
        *map(str, model.generate(PROMPTS, max_new_tokens=4, **decoding)),
        view.ask("what?", max_new_tokens=3),
        chat.send("hello", [A], max_new_tokens=3),
        chat.send("more", max_new_tokens=3),
    ]


def losses(model: Any, *kinds: str, rows: Any = ROWS) -> list[float]:
    """Return the losses of objectives, after whose gradients every trained part has one on its own device."""
    torch.manual_seed(0)
    for parameter in (*model.connector.parameters(), *model.adapters.parameters(), *model.heads.parameters()):
        parameter.requires_grad_(True)
    objectives = objectives_of([ObjectiveSpec(type=kind) for kind in kinds])
    values = model(*inputs(model, rows, model.features), objectives)
    sum(values).backward()
    gradients = {p.grad.device for p in model.parameters() if p.grad is not None}
    assert gradients == {model.device}
    return [float(value.detach()) for value in values]


# Parts by themselves.


@pytest.mark.parametrize("family", ENCODER_FAMILIES)
def test_an_encoder(gpu, tmp_path, tiny_parts, family):
    folder = ENCODER_FAMILIES[family](tmp_path / "encoder")
    cpu, device = both(lambda **options: mllm.assemble(folder, tiny_parts[1], **options))
    features = device.features([A, B])
    assert on_device(device) and features.is_cuda
    torch.testing.assert_close(features.cpu(), cpu.features([A, B]), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", AUDIO_FAMILIES)
def test_an_audio_encoder(gpu, tmp_path, tiny_parts, family):
    folder = AUDIO_FAMILIES[family](tmp_path / "encoder")
    encoder = {"type": "audio", "model": folder, "seconds": 1}
    sound = Sound(np.sin(np.arange(8000) / 9).astype(np.float32), 16000)
    cpu, device = both(lambda **options: mllm.assemble(encoder, tiny_parts[1], **options))
    torch.testing.assert_close(device.features([sound]).cpu(), cpu.features([sound]), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("kind", ["fuse", "video", "merged video", "dual-encoder"])
def test_an_encoder_of_encoders(gpu, tiny_parts, tiny_clip, kind):
    one = {"model": tiny_parts[0]}
    encoder: Any = {
        "fuse": {"fuse": "width", "of": [one, one]},
        "video": {"type": "video", "of": one, "frames": 3},
        "merged video": {"type": "video", "of": one, "frames": 3, "pool": "merge", "keep": 2},
        "dual-encoder": {"type": "dual-encoder", "model": tiny_clip},
    }[kind]
    image = Clip((A, B, A)) if "video" in kind else A
    cpu, device = both(lambda **options: mllm.assemble(encoder, tiny_parts[1], **options))
    torch.testing.assert_close(device.features([image]).cpu(), cpu.features([image]), atol=1e-5, rtol=1e-4)
    assert device.generate([[image, "A"]], max_new_tokens=2) == cpu.generate([[image, "A"]], max_new_tokens=2)


# transformers computes mixtral on a GPU by an operation that torch has for no CPU.
@pytest.mark.parametrize("family", [family for family in LM_FAMILIES if family != "mixtral"])
def test_a_language_model(gpu, tmp_path, tiny_parts, family):
    folder = LM_FAMILIES[family](tmp_path / "lm")
    cpu, device = both(
        lambda **options: mllm.assemble(tiny_parts[0], folder, {"type": "linear", "tokens": 1}, **options)
    )
    assert answers(device) == answers(cpu)
    assert device.score([A, "Q"], ["yes", "no"]) == pytest.approx(cpu.score([A, "Q"], ["yes", "no"]), rel=1e-4)
    assert losses(device, "caption") == pytest.approx(losses(cpu, "caption"), rel=1e-4)


@pytest.mark.parametrize("connector", CONNECTORS.values(), ids=CONNECTORS)
def test_a_connector(gpu, tiny_model, connector):
    cpu, device = both(tiny_model, connector=connector)
    assert on_device(device)
    assert answers(device) == answers(cpu)
    assert losses(device, "caption", "patch-contrastive") == pytest.approx(
        losses(cpu, "caption", "patch-contrastive"), rel=1e-4
    )


@pytest.mark.parametrize("adapter", ADAPTERS.values(), ids=ADAPTERS)
def test_an_adapter(gpu, tiny_model, adapter):
    cpu, device = both(tiny_model, adapters=[adapter])
    assert on_device(device)
    for model in (cpu, device):
        for parameter in model.adapters.parameters():  # a new adapter changes nothing
            parameter.data.add_(0.1)
    assert answers(device) == answers(cpu)
    assert losses(device, "caption") == pytest.approx(losses(cpu, "caption"), rel=1e-4)
    with device.adapters_off():
        answers(device)


# Heads, with what reads them.


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
def test_a_head_that_conditions_an_image_decoder(gpu, tiny_model, tiny_decoder, head):
    decoder = {"type": "trained", "model": tiny_decoder}
    cpu, device = both(tiny_model, heads=[head, {"type": "retrieval", "dim": 6, "token": "[IMG0]"}], decoder=decoder)
    assert on_device(device)
    for one, other in zip(*(model.draw(PROMPTS, count=2, seed=3) for model in (cpu, device)), strict=True):
        assert isinstance(one, ImagePart)
        assert np.array_equal(np.asarray(one.image), np.asarray(other.image))
    kinds = ("distillation", "token-prediction", "retrieval")
    assert losses(device, *kinds) == pytest.approx(losses(cpu, *kinds), rel=1e-4)


def test_a_diffusion_pipeline(gpu, tiny_model, pipeline):
    head = {"type": "generation", "tokens": 2, "length": 8, "width": 16, "dim": 16, "layers": 1, "heads": 2}
    decoder = {"type": "diffusers", "model": pipeline[1], "steps": 2}
    cpu, device = both(tiny_model, heads=[head], decoder=decoder)
    texts = [model.decoder.encode(["a cat"]) for model in (cpu, device)]
    assert texts[1].is_cuda
    torch.testing.assert_close(texts[1].cpu(), texts[0])
    images = [np.asarray(model.draw(PROMPTS[:1], seed=3)[0].image).astype(int) for model in (cpu, device)]
    assert np.abs(images[0] - images[1]).max() <= 1
    kinds = ("distillation", "score-distillation")
    assert losses(device, *kinds) == pytest.approx(losses(cpu, *kinds), rel=1e-3)


def test_an_index_and_answers_with_its_images(gpu, tiny_model, tiny_decoder, tmp_path):
    for number in range(3):
        tiny_image(number).save(tmp_path / f"{number}.png")
    paths = sorted(tmp_path.glob("*.png"))
    heads = [{"type": "retrieval", "dim": 6, "token": "[IMG0]"}, condition_head("affine"), {"type": "decision"}]
    decoder = {"type": "trained", "model": tiny_decoder}
    cpu, device = both(tiny_model, heads=heads, decoder=decoder)
    index = ImageIndex.build(device, paths)
    torch.testing.assert_close(index.vectors, ImageIndex.build(cpu, paths).vectors)
    found = [[image.source for image in row] for row in device.retrieve(PROMPTS, index, 2)]
    assert found == [[image.source for image in row] for row in cpu.retrieve(PROMPTS, index, 2)]
    shown = [
        list(map(str, model.generate(PROMPTS, index=index, image_logit_bias=9.0, max_new_tokens=3)))
        for model in (cpu, device)
    ]
    assert shown[0] == shown[1]
    rows = [[A, "show", Target("generate")], ["find", Target("retrieve")]]
    assert losses(device, "decision", rows=rows) == pytest.approx(losses(cpu, "decision", rows=rows), rel=1e-4)


@pytest.fixture
def matching(tiny_parts, tmp_path):
    tiny_tokenizer().save_pretrained(tmp_path / "words")
    qformer = {"type": "qformer", "dim": 16, "layers": 2, "heads": 2, "tokens": 5, "words": str(tmp_path / "words")}
    heads = [{"type": "contrast", "inside": 16, "dim": 6}, {"type": "match", "inside": 16}]
    return lambda **options: mllm.assemble(tiny_parts[0], None, qformer, heads=heads, **options)  # type: ignore[arg-type]


def test_a_matching_head_and_its_scorer(gpu, matching):
    cpu, device = both(matching)
    assert on_device(device)
    expected, scores = (model.scorer.image_text([A, B], ["a cat", "two"]) for model in (cpu, device))
    torch.testing.assert_close(scores.cpu(), expected, atol=1e-5, rtol=1e-4)
    matches = [model.scorer.matches([A, B], ["a cat", "two"]) for model in (cpu, device)]
    torch.testing.assert_close(matches[1].cpu(), matches[0], atol=1e-5, rtol=1e-4)
    kinds = ("itc", "itg")  # itm draws at random
    assert losses(device, *kinds) == pytest.approx(losses(cpu, *kinds), rel=1e-4)
    assert losses(device, "itm")


def test_a_sentence_encoder_and_its_scorer(gpu, tiny_parts):
    lm = {"type": "sentences", "model": tiny_parts[1]}
    cpu, device = both(lambda **options: mllm.assemble(tiny_parts[0], lm, **options))
    expected, scores = (model.scorer.image_text([A, B], ["a cat", "two"]) for model in (cpu, device))
    torch.testing.assert_close(scores.cpu(), expected, atol=1e-5, rtol=1e-4)
    assert losses(device, "contrastive") == pytest.approx(losses(cpu, "contrastive"), rel=1e-4)


@pytest.mark.parametrize("kind", ["dual-encoder", "aligned"])
def test_a_scorer_of_the_recipe_reranks_candidates(gpu, tiny_parts, tiny_model, tiny_clip, tmp_path, kind):
    mllm.assemble(tiny_parts[0], {"type": "sentences", "model": tiny_parts[1]}).save(tmp_path / "run")
    scorer = {"type": kind, "model": tiny_clip if kind == "dual-encoder" else str(tmp_path / "run")}
    cpu, device = both(tiny_model, scorer=scorer)
    options = {"candidates": 2, "seed": 3, "max_new_tokens": 3}
    assert on_device(device.scorer)
    assert device.generate(PROMPTS[:2], **options) == cpu.generate(PROMPTS[:2], **options)


def test_suppressed_image_tokens_and_contrastive_decoding(gpu, tiny_model):
    cpu, device = both(tiny_model, heads=[{"type": "retrieval", "dim": 6}])
    assert losses(device, "token-suppression")
    options = {"contrastive": {"alpha": 0.5}, "max_new_tokens": 3}
    assert device.generate(PROMPTS[:2], **options) == cpu.generate(PROMPTS[:2], **options)
    words = {"nearest_words": {"top": 3}, "max_new_tokens": 3}
    assert device.generate(PROMPTS[:2], **words) == cpu.generate(PROMPTS[:2], **words)


# Closed forms.


def fitted(fit: Any, *models: Any, examples: Any = ()) -> None:
    """Check that a fit on the device sets the parts to what it sets them to on the CPU."""
    cpu, device = models
    for model in models:
        fit(model, Material(ITEMS, model.features if model.encoder else None, examples=lambda: examples))
    assert on_device(device)
    for name, tensor in cpu.trained_state().items():
        torch.testing.assert_close(device.trained_state()[name], tensor, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("connector", ["linear", "mlp", "mapper", "qformer"])
def test_a_connector_is_fitted(gpu, tiny_model, connector):
    fitted(ConnectorFit(strength=0.1, chunk=4), *both(tiny_model, connector=CONNECTORS[connector]))


def test_a_connector_is_fitted_on_token_strings(gpu, tiny_parts, tiny_clip):
    encoder = {"type": "dual-encoder", "model": tiny_clip}
    fitted(
        ConnectorFit(targets="tokens", strength=0.1),
        *both(lambda **options: mllm.assemble(encoder, tiny_parts[1], **options)),
    )


def test_a_connector_is_fitted_on_sentences(gpu, tiny_parts):
    lm = {"type": "sentences", "model": tiny_parts[1]}
    fitted(
        ConnectorFit(targets="sentences", strength=0.1),
        *both(lambda **options: mllm.assemble(tiny_parts[0], lm, **options)),
    )


def test_heads_are_fitted(gpu, tiny_model, tiny_decoder):
    heads = [{"type": "retrieval", "dim": 6, "token": "[IMG0]"}, condition_head("affine"), {"type": "decision"}]
    options = {"heads": heads, "decoder": {"type": "trained", "model": tiny_decoder}}
    fitted(RetrievalFit(part="heads.retrieval", solver="correlation", strength=1.0), *both(tiny_model, **options))
    fitted(AffineFit(part="heads.affine", strength=0.1), *both(tiny_model, **options))
    examples = [[A, "show", Target("generate")], ["find", Target("retrieve")]] * 2
    fitted(DecisionFit(part="heads.decision", strength=0.1), *both(tiny_model, **options), examples=examples)


def test_an_image_decoder_is_fitted(gpu, tiny_parts):
    head = {"type": "pixels", "side": 8, "features": 16, "rank": 2, "noise": 0.0}
    lm = {"type": "sentences", "model": tiny_parts[1]}
    device = mllm.assemble(None, lm, None, heads=[head])  # type: ignore[arg-type]
    assert 0 < PixelsFit(part="heads.pixels")(device, Material(ITEMS)) <= 1
    assert on_device(device)
