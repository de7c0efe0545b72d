"""A language model in 8 or 4 bits, frozen: what is around it trains, is saved, and gives the same again."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import mllm
from mllm.lms.language_model import LanguageModel
from mllm.lms.runners.cached import CachedRunner
from mllm.objectives.caption import Caption
from mllm.prompts.batch import collate
from mllm.prompts.pieces import Target, images_of
from mllm.slots import Inputs
from mllm.testing import tiny_image, tiny_lm

PROMPTS: list[list[Any]] = [[tiny_image(1), "A cat.", tiny_image(2), "What?"], ["Short ", tiny_image(3)]]


def loss(model: Any) -> Any:
    rows = [[*prompt, Target(" so it is")] for prompt in PROMPTS]
    batch = collate([model.encode(row) for row in rows], model.lm.pad)
    return Caption()(Inputs(model, rows, model.features([image for row in rows for image in images_of(row)]), batch))


@pytest.fixture(params=["8bit", "4bit"])
def spec(request, tmp_path):
    return {"model": tiny_lm(tmp_path / "lm", dim=64), "quantize": request.param}


def test_gradient_is_that_of_the_weights_that_are_computed_with(spec):
    """Also after passes without one: bitsandbytes would then compute with another layout of 4-bit weights."""
    quantized, full = LanguageModel(model=spec["model"], quantize=spec["quantize"]), LanguageModel(model=spec["model"])
    full.model = LanguageModel(model=spec["model"], quantize=spec["quantize"]).model.dequantize().float()
    full.runner = CachedRunner(full.model)
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    found: list[Any] = []
    for lm in (quantized, full):
        embeds = lm.embed(ids).detach().requires_grad_()
        with torch.no_grad():
            lm.logits(embeds.detach(), torch.ones_like(ids))
        lm.logits(embeds, torch.ones_like(ids)).square().mean().backward()
        found.append(embeds.grad)
    assert (found[0] - found[1]).norm() < 0.1 * found[1].norm()


def test_connector_and_lora_train_on_a_quantized_model(spec, tiny_parts, tmp_path):
    model = mllm.assemble(tiny_parts[0], spec, {"type": "linear", "tokens": 4}, adapters=[{"type": "lora", "r": 2}])
    assert isinstance(model.lm.runner, CachedRunner)
    kinds = {type(module).__name__ for module in model.lm.model.modules()}
    assert kinds & {"Linear8bitLt", "Linear4bit"}
    full = mllm.assemble(tiny_parts[0], spec["model"], {"type": "linear", "tokens": 4})
    assert model.lm.model.get_memory_footprint() < full.lm.model.get_memory_footprint()
    before, frozen = float(loss(model).detach()), model.frozen_hash("lm")
    assert before == pytest.approx(float(loss(full).detach()), rel=0.1)
    model.requires_grad_(False)
    trained = [p.requires_grad_(True) for part in (model.connector, model.adapters) for p in part.parameters()]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    for _ in range(5):
        optimizer.zero_grad()
        loss(model).backward()
        assert all(parameter.grad is not None for parameter in trained)
        optimizer.step()
    after = loss(model).detach()
    assert float(after) < 0.9 * before
    assert model.frozen_hash("lm") == frozen
    again = mllm.load(model.save(tmp_path / "saved"))
    assert torch.equal(loss(again).detach(), after)
    assert [str(answer) for answer in model.generate(PROMPTS, max_new_tokens=3)] == [
        str(answer) for answer in again.generate(PROMPTS, max_new_tokens=3)
    ]
