"""Answers on one GPU: a batch as its members, a view as the prompt, kept features as fresh ones."""

from __future__ import annotations

import os

import pytest
import torch

import mllm
from mllm.encoders.feature_store import FeatureStore
from mllm.testing import tiny_image

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(60)]

SMOKE = os.environ.get("SMOKE") == "1"
PROMPTS = [*([tiny_image(index), "A" * (index + 1)] for index in range(6)), ["only text"]]


@pytest.fixture
def model(trained, device):
    return mllm.load(trained).to(device)


def test_a_model_is_loaded_on_the_device(trained, device, figures):
    figures["device after mllm.load"] = mllm.load(trained).device
    assert mllm.load(trained).device.type == device


@pytest.mark.parametrize("decoding", [{}, {"temperature": 0.8, "top_p": 0.9, "seed": 3}], ids=["greedy", "sampled"])
def test_a_batch_is_answered_as_its_members(model, figures, decoding):
    batch = list(map(str, model.generate(PROMPTS, max_new_tokens=16, **decoding)))
    alone = [str(model.generate([prompt], max_new_tokens=16, **decoding)[0]) for prompt in PROMPTS]
    equal = sum(a == b for a, b in zip(batch, alone, strict=True))
    figures["answers of the batch that are those of its members"] = f"{equal} of {len(PROMPTS)}"
    assert batch == alone


def test_a_view_is_answered_as_the_whole_prompt(model):
    question = "\n" + model.spec.prompt.question.format(question="what")
    expected = str(model.generate([[tiny_image(1), question]], max_new_tokens=8)[0])
    assert model.see([tiny_image(1)]).ask("what", max_new_tokens=8) == expected


def test_scores_are_those_of_the_cpu(model):
    scores = model.score([tiny_image(1), "Q"], ["yes", "no"])
    expected = model.to("cpu").score([tiny_image(1), "Q"], ["yes", "no"])
    assert scores == pytest.approx(expected, rel=1e-3)


def test_a_streamed_turn_is_the_turn(model):
    def turns(streamed: bool) -> str:
        chat = model.chat()
        chat.send("hello", [tiny_image(2)], max_new_tokens=6)
        return "".join(chat.stream("more", max_new_tokens=6)) if streamed else chat.send("more", max_new_tokens=6)

    assert turns(streamed=True).strip() == turns(streamed=False)


def test_the_hash_of_the_weights_is_that_of_the_cpu(model, trained):
    assert model.frozen_hash("lm") == mllm.load(trained).to("cpu").frozen_hash("lm")


def test_kept_features_are_bit_identical(model, tmp_path, figures):
    images = [tiny_image(index) for index in range(20)]
    store = FeatureStore(model, folder=tmp_path)
    first, second = store(images), store(images)
    store.flush()
    fresh = model.features(images)
    figures["fresh features (one batch) beside kept ones"] = float((fresh - first).abs().max())
    assert torch.equal(first, second)
    assert torch.equal(first.cpu(), FeatureStore(model, folder=tmp_path)(images).cpu())
    torch.testing.assert_close(fresh, first.to(fresh.device), rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(SMOKE, reason="a CPU has no memory beside the host's")
def test_kept_features_take_no_memory_of_the_device(model, tmp_path, figures):
    images = [tiny_image(index) for index in range(200)]
    store = FeatureStore(model, folder=tmp_path)
    size = store(images[:1]).nbytes
    before = torch.cuda.memory_allocated()
    for image in images:
        store([image])
    figures["bytes kept on the device, of all"] = (torch.cuda.memory_allocated() - before) / (len(images) * size)
    assert torch.cuda.memory_allocated() - before < len(images) * size / 2
