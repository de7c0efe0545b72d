"""Models are built where torch has a GPU, here a pretend one, and every call runs where the model is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers

import mllm
from mllm.build import build_encoder, build_lm, join
from mllm.config.parts import AssemblySpec
from mllm.encoders.feature_store import FeatureStore
from mllm.errors import MLLMError
from mllm.export.export import export
from mllm.testing import tiny_image, tiny_lm

A, B = tiny_image(1), tiny_image(2)


# A model answers on the device as on the CPU.


def generates(**decoding: Any) -> Callable[[Any], Any]:
    prompts = [[A, "AAA"], [B, "A"], ["only text"]]
    return lambda model: list(map(str, model.generate(prompts, max_new_tokens=6, **decoding)))


def chats(model: Any) -> list[str]:
    chat = model.chat(system="Be brief.")
    return [chat.send("hello", [A], max_new_tokens=4), "".join(chat.stream("more", max_new_tokens=4))]


CALLS = {
    "greedy": generates(),
    "sampled": generates(temperature=0.8, top_p=0.9, seed=3),
    "beams": generates(num_beams=2),
    "stop strings": generates(stop_strings=["x"]),
    "ask": lambda model: model.see([A]).ask("what?", max_new_tokens=4),
    "go on": lambda model: model.see([A, "text"]).continue_with(" more", max_new_tokens=4),
    "score": lambda model: model.score([A, "Q"], ["yes", "no"]),
    "chat": chats,
    "features": lambda model: model.features([A, B]).tolist(),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_model_on_the_device_answers_as_on_the_cpu(tiny_model, gpu, call):
    model = tiny_model(device="cpu")
    expected = call(model)
    model.to("cuda")
    if isinstance(expected[0], str):
        assert call(model) == expected
    else:
        torch.testing.assert_close(torch.tensor(call(model)), torch.tensor(expected))
    assert {parameter.device.type for parameter in model.parameters()} == {"cuda"}


def test_a_generated_token_costs_no_more_synchronizations_than_in_transformers(tiny_model, gpu):
    model = tiny_model()
    embeds, batch = model.prepare([[A, "A"]])

    def per_token(generate: Callable[[int], Any]) -> float:
        counts = []
        for tokens in (4, 8):
            gpu.synchronizations.clear()
            generate(tokens)
            counts.append(gpu.synchronizations.total())
        return (counts[1] - counts[0]) / 4

    stock = per_token(
        lambda tokens: model.lm.model.generate(
            inputs_embeds=embeds, attention_mask=batch.mask, max_new_tokens=tokens, pad_token_id=model.lm.pad
        )
    )
    assert stock > 0
    assert per_token(lambda tokens: model.generate([[A, "A"]], max_new_tokens=tokens)) <= stock + 1


def test_what_is_saved_on_the_device_is_what_was_there(tiny_model, gpu, tmp_path):
    model = tiny_model()
    again = mllm.load(model.save(tmp_path / "run"))
    for name, tensor in again.connector.state_dict().items():
        assert torch.equal(tensor.cpu(), model.connector.state_dict()[name].cpu())
    assert again.frozen_hash("lm") == model.frozen_hash("lm")


# Whoever loads a model finds it on the device, all of it.


def devices(model: Any) -> set[str]:
    return {tensor.device.type for tensor in (*model.parameters(), *model.buffers())}


def test_a_model_is_assembled_and_loaded_on_the_device(gpu, tiny_model, tmp_path):
    model = tiny_model()
    assert devices(model) == devices(mllm.load(model.save(tmp_path / "run"))) == {"cuda"}


@pytest.mark.parametrize("name", ["cpu", "cuda", "cuda:0", torch.device("cpu")], ids=str)
def test_a_model_is_put_where_it_is_asked_for(gpu, tiny_model, tmp_path, name):
    model = tiny_model(device=name)
    expected = {torch.device(name).type}
    assert devices(model) == devices(mllm.load(model.save(tmp_path / "run"), device=name)) == expected
    assert mllm.load(tmp_path / "run").device.type == "cuda", "the choice is that call's alone"


@pytest.mark.parametrize("name", ["cuda:1", "mps", "gpu", "meta"])
def test_a_device_that_is_not_there_is_an_error(gpu, tiny_model, name):
    with pytest.raises(MLLMError, match=f"device.*{name}"):
        tiny_model(device=name)


def test_without_a_gpu_everything_is_on_the_cpu(tiny_model, tmp_path, fresh_accelerator, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert devices(mllm.load(tiny_model().save(tmp_path / "run"))) == {"cpu"}


def test_parts_of_two_devices_are_brought_together(gpu, tiny_parts):
    spec = tiny_spec(tiny_parts)
    encoder, lm = build_encoder(spec), build_lm(spec)
    lm.to("cuda")
    assert devices(join(spec, encoder=encoder, lm=lm)) == {"cuda"}
    assert devices(join(spec, encoder=encoder, lm=lm, device="cpu")) == {"cpu"}


def test_the_weights_of_new_parts_depend_on_the_seed_and_not_on_the_device(gpu, tiny_parts):
    settings = {"adapters": [{"type": kind} for kind in ("lora", "bottleneck", "prefix")], "tokens": ["[A]", "[B]"]}
    spec = tiny_spec(tiny_parts, **settings)
    states = []
    for device in ("cpu", "cuda"):
        lm = build_lm(spec)
        lm.to(device)
        states.append(join(spec, encoder=build_encoder(spec), lm=lm).trained_state())
    assert states[0].keys() == states[1].keys()
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name]), name


def tiny_spec(parts: tuple[str, str], **settings: Any) -> AssemblySpec:
    values = {"encoder": {"model": parts[0]}, "lm": {"model": parts[1]}, "connector": {"type": "linear"}, **settings}
    return AssemblySpec.model_validate(values)


# Quantized language models: transformers puts them on the GPU by itself.


def test_a_language_model_that_is_on_the_device_by_itself_answers(gpu, tiny_model, monkeypatch):
    load = transformers.PreTrainedModel.from_pretrained.__func__  # type: ignore[attr-defined]

    def on_device(cls: Any, *args: Any, **options: Any) -> Any:
        loaded = load(cls, *args, **options)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if model.can_generate():
            model.to("cuda")
        return loaded

    monkeypatch.setattr(transformers.PreTrainedModel, "from_pretrained", classmethod(on_device))
    model = tiny_model()
    assert {parameter.device.type for parameter in model.lm.parameters()} == {"cuda"}
    assert len(model.generate([[A, "A"]], max_new_tokens=2)) == 1


@pytest.mark.parametrize("quantize", ["8bit", "4bit"])
def test_a_quantized_language_model_is_built_on_the_device_of_the_model(gpu, tiny_parts, tmp_path, quantize):
    lm = {"model": tiny_lm(tmp_path / "lm", dim=64), "quantize": quantize}
    model = mllm.assemble(tiny_parts[0], lm, device="cpu")  # on a machine that has a GPU
    assert {type(module).__name__ for module in model.lm.modules()} & {"Linear8bitLt", "Linear4bit"}
    assert devices(model) == {"cpu"}
    assert len(model.generate([[A, "A"]], max_new_tokens=2)) == 1


# Features that are kept.


def test_kept_features_are_in_the_memory_of_the_host(gpu, tiny_model, tmp_path):
    model = tiny_model()
    store = FeatureStore(model, folder=tmp_path)
    first = store([A, B])
    assert gpu.pinned == 4, "two rows, and the pixels of two images on their way to the device"
    store.flush()
    again, mixed = FeatureStore(model, folder=tmp_path), [B, tiny_image(3), A]
    for features in (first, store([A, B]), store(mixed), again([A, B]), again(mixed)):
        assert features.is_cuda
        torch.testing.assert_close(features, model.features([A, B] if len(features) == 2 else mixed))
    assert {row.device.type for each in (store, again) for row in each._rows._used._rows.values()} == {"cpu"}


# Exports.


def test_a_model_on_the_device_is_exported(gpu, tiny_clip, tiny_parts, tmp_path):
    encoder = {"model": tiny_clip, "layer": -2}
    model = mllm.assemble(encoder, tiny_parts[1], "mlp")
    assert devices(model) == {"cuda"}
    export(model, tmp_path / "exported", to="hf-llava")
    assert (tmp_path / "exported" / "config.json").is_file()
