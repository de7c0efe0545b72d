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
    assert len(workplace.train("half", encoder=half_encoder, precision="auto", steps=2)) == 2


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
