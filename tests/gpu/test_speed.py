"""Speed and memory at real shapes: LLaVA's first stage and decoding, with CLIP-L/336 and an 8B decoder in bfloat16."""

from __future__ import annotations

import hashlib
import math
import os
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

import mllm
from mllm.testing import tiny_image
from mllm.training import batches, loop

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("real_shapes")]

VISUAL_TOKENS, TEXT_TOKENS = 576, 40
LM_PARAMETERS, ENCODER_FLOPS = 8.03e9, 0.37e12
PEAK = 989e12  # bfloat16 FLOP/s of an H100 or H200
IMAGE_TOKEN = 300
SIZES = [pytest.param(True, 16, id="16-checkpointing"), pytest.param(False, 8, id="8")]


def median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


@pytest.fixture
def seconds(synchronize) -> Callable[[Callable[[], Any]], float]:
    """Return a function that runs another, and returns the seconds until the device has done its work."""

    def measured(run: Callable[[], Any]) -> float:
        synchronize()
        start = time.monotonic()
        run()
        synchronize()
        return time.monotonic() - start

    return measured


@pytest.mark.timeout(120)
@pytest.mark.parametrize(("checkpointing", "batch_size"), SIZES)
def test_a_step_of_llavas_first_stage(workplace, monkeypatch, seconds, figures, smoke, checkpointing, batch_size):
    batch_size = 4 if smoke else batch_size
    steps = _timed(monkeypatch, loop.Loop, "step", seconds)
    inputs = _timed(monkeypatch, batches, "inputs", seconds)
    if not smoke:
        torch.cuda.reset_peak_memory_stats()
    losses = workplace.train(
        f"step-{batch_size}-{checkpointing}",
        encoder=workplace.parts / "clip-l-336",
        encoder_options=", init: random",
        lm=workplace.parts / "llama-8b",
        lm_options=", init: random, dtype: bfloat16",
        precision="float32" if smoke else "auto",
        checkpointing=str(checkpointing).lower(),
        steps=3 if smoke else 8,
        batch_size=batch_size,
    )
    assert len(losses) == len(steps) and all(map(math.isfinite, losses))
    tokens = batch_size * (VISUAL_TOKENS + TEXT_TOKENS)  # frozen: forward, and the gradient of the inputs; CLIP once
    flops = tokens * LM_PARAMETERS * 4 + batch_size * ENCODER_FLOPS
    figures["seconds of a step"] = round(median(steps), 3)
    figures["of it inputs: opened, preprocessed, encoded"] = round(median(inputs), 3)
    figures["images/s"] = round(batch_size / median(steps), 1)
    if not smoke:
        figures[f"MFU of {PEAK / 1e12:.0f} TFLOP/s"] = round(flops / median(steps) / PEAK, 3)
        figures["peak GB"] = round(torch.cuda.max_memory_allocated() / 1e9, 1)


def _timed(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, seconds: Any) -> list[float]:
    """Measure every call of a function, and return the list of seconds that grows."""
    function, times = getattr(owner, name), []

    def measured(*args: Any, **options: Any) -> Any:
        results: list[Any] = []
        times.append(seconds(lambda: results.append(function(*args, **options))))
        return results[0]

    monkeypatch.setattr(owner, name, measured)
    return times


@pytest.fixture(scope="module")
def stock(workplace, device):
    """The same model of transformers' own LLaVA, whose projector trains."""
    config = LlavaConfig(
        vision_config=CLIPVisionConfig.from_pretrained(workplace.parts / "clip-l-336"),
        text_config=LlamaConfig.from_pretrained(workplace.parts / "llama-8b"),
        image_token_index=IMAGE_TOKEN,
    )
    with torch.device(device):
        model: Any = LlavaForConditionalGeneration._from_config(config, dtype=torch.bfloat16)
    model.requires_grad_(False)
    model.model.multi_modal_projector.float().requires_grad_(True)
    return model


@pytest.mark.timeout(90)
@pytest.mark.parametrize(("checkpointing", "batch_size"), SIZES)
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")  # renamed in transformers 5.23
def test_a_step_of_transformers_own_llava(stock, device, seconds, figures, smoke, checkpointing, batch_size):
    """What there is to reach: the images are on the device and preprocessed."""
    batch_size = 2 if smoke else batch_size
    if checkpointing:
        stock.gradient_checkpointing_enable({"use_reentrant": False})
        stock.train()
    else:
        stock.gradient_checkpointing_disable()
    optimizer = torch.optim.AdamW(stock.model.multi_modal_projector.parameters(), lr=1e-3)
    pixels = torch.randn(batch_size, 3, 336, 336, device=device, dtype=torch.bfloat16)
    ids = torch.randint(0, 250, (batch_size, VISUAL_TOKENS + TEXT_TOKENS), device=device)
    ids[:, :VISUAL_TOKENS] = IMAGE_TOKEN
    labels = ids.clone()
    labels[:, : VISUAL_TOKENS + TEXT_TOKENS // 2] = -100
    losses = []

    def step() -> None:
        with torch.autocast(device, dtype=torch.bfloat16):
            mask = torch.ones_like(ids)
            loss = stock(input_ids=ids, pixel_values=pixels, attention_mask=mask, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())

    times = [seconds(step) for _ in range(2 if smoke else 7)]
    assert all(map(math.isfinite, torch.stack(losses).tolist()))
    figures["seconds of a step"] = round(median(times), 3)
    figures["images/s"] = round(batch_size / median(times), 1)


@pytest.fixture(scope="module")
def big(workplace, real_shapes, device):
    """A model of real shapes on the device."""
    model = mllm.assemble(
        {"model": str(workplace.parts / "clip-l-336"), "layer": -2, "init": "random"},
        {"model": str(workplace.parts / "llama-8b"), "init": "random", "dtype": "bfloat16"},
        "mlp",
    )
    return model.to(device)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("rows", [1, 16])
@pytest.mark.parametrize("decoding", [{}, {"temperature": 0.8, "top_p": 0.9, "seed": 0}], ids=["greedy", "sampled"])
def test_decoding(big, seconds, figures, smoke, rows, decoding):
    new = 8 if smoke else 64
    prompts = [[tiny_image(index), "Describe this."] for index in range(rows)]
    options = {**decoding, "min_new_tokens": new, "max_new_tokens": new}
    big.generate(prompts, **{**options, "min_new_tokens": 2, "max_new_tokens": 2})
    answers: list[Any] = []
    took = seconds(lambda: answers.extend(big.generate(prompts, **options)))
    assert len(answers) == rows
    figures["tokens/s"] = round(rows * new / took)


@pytest.mark.timeout(60)
def test_preprocessing_and_encoding(big, device, seconds, figures, smoke):
    images = [tiny_image(index, (640, 480)) for index in range(8 if smoke else 64)]
    pixels: list[torch.Tensor] = []
    took = seconds(lambda: pixels.append(big.encoder.preprocess(images)))
    assert pixels[0].shape == (len(images), 3, 336, 336)
    figures["preprocessed images/s, one thread"] = round(len(images) / took)
    for dtype in (torch.float32, torch.bfloat16):
        big.encoder.to(dtype)
        batch = pixels[0].to(device, dtype)
        with torch.no_grad():
            assert torch.isfinite(big.encoder(batch)).all()
            figures[f"encoded images/s in {dtype}"] = round(
                len(images) / seconds(lambda batch=batch: big.encoder(batch))
            )


def test_hashing(figures, seconds):
    data = os.urandom(2**24 if os.environ.get("SMOKE") == "1" else 2**28)
    digests: list[str] = []
    rate = len(data) / seconds(lambda: digests.append(hashlib.sha256(data).hexdigest())) / 1e9
    assert len(digests[0]) == 64
    figures["GB/s of SHA-256"] = round(rate, 2)
    figures["seconds for the weights of the 8B decoder"] = round(2 * LM_PARAMETERS / 1e9 / rate)
