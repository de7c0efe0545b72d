"""Parts in half precision and in 8 and 4 bit, and a compiled step."""

from __future__ import annotations

import os

import pytest
import torch
import transformers

import mllm
from mllm.testing import tiny_image

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(60)]

SMOKE = os.environ.get("SMOKE") == "1"
IMAGE = tiny_image(1)


@pytest.fixture(scope="module")
def half_encoder(workplace):
    """The tiny encoder, stored in bfloat16."""
    folder = workplace.parts / "clip-bfloat16"
    transformers.AutoModel.from_pretrained(workplace.parts / "clip").to(torch.bfloat16).save_pretrained(folder)
    transformers.AutoImageProcessor.from_pretrained(workplace.parts / "clip", backend="pil").save_pretrained(folder)
    return str(folder)


def test_an_encoder_in_half_precision_is_trained_on(workplace, half_encoder):
    losses = workplace.train("half", encoder=half_encoder, encoder_options="", precision="auto", steps=2)
    assert len(losses) == 2


def test_an_encoder_in_half_precision_answers(workplace, half_encoder, device):
    lm = str(workplace.parts / "lm")
    model = mllm.assemble({"model": half_encoder, "layer": -2}, lm, "mlp").to(device)
    assert len(model.generate([[IMAGE, "A"]], max_new_tokens=2)) == 1


@pytest.fixture(scope="module", params=["4bit", "8bit"])
def quantized(request, workplace):
    """A run with LoRA on a quantized language model."""
    pytest.importorskip("bitsandbytes", reason="quantization needs bitsandbytes")
    workplace.train(
        request.param,
        lm_options=f", quantize: {request.param}",
        precision="auto",
        adapters="[{type: lora, r: 4}]",
        train="{connector: 1.0e-3, adapters: 2.0e-4}",
    )
    return workplace.folder / request.param


def test_lora_on_a_quantized_language_model_lowers_the_loss(workplace, quantized, figures):
    losses = workplace.losses(quantized.name)
    figures["losses"] = [round(loss, 3) for loss in losses[::4]]
    assert sum(losses[-3:]) < sum(losses[:3])


def test_a_quantized_model_answers_as_it_is_loaded(quantized, figures):
    model = mllm.load(quantized)
    figures["devices"] = sorted({str(parameter.device) for parameter in model.parameters()})
    assert len(model.generate([[IMAGE, "A"]], max_new_tokens=4)) == 1


def test_a_quantized_model_answers_on_the_device(quantized, device):
    assert len(mllm.load(quantized).to(device).generate([[IMAGE, "A"]], max_new_tokens=4)) == 1


@pytest.mark.timeout(300 if SMOKE else 90)  # compiling for a CPU takes minutes
def test_compiled_steps_have_the_losses_of_plain_ones(workplace, figures):
    precision = "float32" if SMOKE else "auto"
    plain = workplace.train("plain", precision=precision)
    compiled = workplace.train("compiled", precision=precision, compile="true")
    figures["largest difference of losses"] = max(abs(a - b) for a, b in zip(plain, compiled, strict=True))
    assert compiled == pytest.approx(plain, rel=1e-4 if SMOKE else 3e-2)


def test_a_frozen_encoder_computes_in_bfloat16_where_the_device_does(workplace, device):
    model = mllm.assemble(str(workplace.parts / "clip"), str(workplace.parts / "lm"), device=device)
    expected = torch.float32 if SMOKE else torch.bfloat16
    assert {parameter.dtype for parameter in model.encoder.parameters()} == {expected}
    assert model.lm.model.dtype == torch.float32, "as it is stored"


@pytest.fixture(scope="module")
def half_lm(workplace):
    """The tiny language model, stored in float16."""
    folder = workplace.parts / "lm-float16"
    lm = str(workplace.parts / "lm")
    transformers.AutoModelForCausalLM.from_pretrained(lm, dtype=torch.float16).save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(lm).save_pretrained(folder)
    return str(folder)


def test_a_language_model_in_half_precision_learns_as_one_in_float32(workplace, half_lm, figures):
    train = "{lm: 1.0e-4}"
    expected = workplace.train("whole-lm", precision="auto", train=train)
    losses = workplace.train("half-lm", lm=half_lm, precision="auto", train=train)
    figures["largest relative difference of losses"] = max(
        abs(a - b) / b for a, b in zip(losses, expected, strict=True)
    )
    assert losses == pytest.approx(expected, rel=3e-2) and losses[-1] < losses[0]


def test_the_losses_of_a_stored_attention_are_those_of_the_default(workplace):
    expected = workplace.train("attention-default", steps=4)
    eager = workplace.train("attention-eager", lm_options=", attn_implementation: eager", steps=4)
    assert eager == pytest.approx(expected, rel=1e-4)
