"""Every call runs where the model is, and every command puts it where torch has a GPU, here a pretend one."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers
import yaml
from torch.nn.modules.module import register_module_forward_pre_hook

import mllm
from mllm.__main__ import main
from mllm.testing import tiny_image

A, B = tiny_image(1), tiny_image(2)


def planned(clause: str, raises: type[BaseException] = AssertionError) -> pytest.MarkDecorator:
    return pytest.mark.xfail(strict=True, raises=raises, reason=f"Right with the parts that people bring: {clause}")


# A model that was moved by hand answers there as on a CPU.


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
    model = tiny_model()
    expected = call(model)
    model.to("cuda")
    if isinstance(expected[0], str):
        assert call(model) == expected
    else:
        torch.testing.assert_close(torch.tensor(call(model)), torch.tensor(expected))
    assert {parameter.device.type for parameter in model.parameters()} == {"cuda"}


def test_a_generated_token_costs_no_more_synchronizations_than_in_transformers(tiny_model, gpu):
    model = tiny_model().to("cuda")
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
    model = tiny_model().to("cuda")
    again = mllm.load(model.save(tmp_path / "run"))
    for name, tensor in again.connector.state_dict().items():
        assert torch.equal(tensor.cpu(), model.connector.state_dict()[name].cpu())
    assert again.frozen_hash("lm") == model.frozen_hash("lm")


# Whoever loads a model finds it on the device.

on_gpu = planned("inference and evaluation run on the GPU that torch reports")


@on_gpu
def test_a_model_is_assembled_on_the_device(gpu, tiny_model):
    assert {parameter.device.type for parameter in tiny_model().parameters()} == {"cuda"}


@on_gpu
def test_a_model_is_loaded_on_the_device(gpu, tiny_model, tmp_path):
    model = mllm.load(tiny_model().save(tmp_path / "run"))
    assert {parameter.device.type for parameter in model.parameters()} == {"cuda"}


@contextlib.contextmanager
def devices_of_linear_layers() -> Iterator[set[str]]:
    """Collect the devices that linear layers run on."""
    devices: set[str] = set()

    def collect(module: torch.nn.Module, args: Any) -> None:
        if isinstance(module, torch.nn.Linear):
            devices.update({module.weight.device.type, args[0].device.type})

    handle = register_module_forward_pre_hook(collect)
    try:
        yield devices
    finally:
        handle.remove()


@pytest.fixture
def folder(tiny_model, tiny_parts, tmp_path):
    """A folder with a saved model, an image, a suite and a recipe."""
    tiny_model().save(tmp_path / "run")
    A.save(tmp_path / "a.png")
    (tmp_path / "rows.json").write_text(json.dumps([{"image": "a.png", "question": "q", "answer": "x"}] * 2))
    suite = {
        "name": "rows",
        "about": "A table.",
        "data": {"format": "table"},
        "folder": {"path": "rows.json"},
        "metrics": ["vqa/exact-match"],
        "decoding": {"max_new_tokens": 2},
    }
    recipe = {
        "name": "tiny",
        "encoder": {"model": tiny_parts[0]},
        "lm": {"model": tiny_parts[1]},
        "connector": {"type": "linear", "tokens": 4},
        "data": {"train": {"format": "table", "path": str(tmp_path / "rows.json")}},
        "stages": [{"name": "align", "train": ["connector"], "steps": 1, "batch_size": 1}],
    }
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump(suite))
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return tmp_path


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(["train", "recipe.yaml", "--out", "trained"], id="train"),
        pytest.param(["caption", "run", "a.png", "--max-new-tokens", "2"], id="caption", marks=on_gpu),
        pytest.param(["ask", "run", "a.png", "what?", "--max-new-tokens", "2"], id="ask", marks=on_gpu),
        pytest.param(["chat", "run", "--max-new-tokens", "2"], id="chat", marks=on_gpu),
        pytest.param(
            ["eval", "run", "--suite", "suite.yaml", "--data", ".", "--baselines", "none", "--out", "eval"],
            id="eval",
            marks=on_gpu,
        ),
    ],
)
def test_a_command_runs_on_the_device(gpu, folder, monkeypatch, arguments):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["mllm", *arguments])
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n"))
    with devices_of_linear_layers() as devices, contextlib.suppress(SystemExit):
        main()
    if not devices:
        raise RuntimeError("The command ended before the model ran.")
    assert "cuda" in devices


@planned("a closed form runs on the GPU that torch reports")
def test_a_fit_that_comes_first_runs_on_the_device(gpu, folder):
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    (folder / "rows.json").write_text(json.dumps([{"image": "a.png", "caption": "x"}] * 2))
    recipe["stages"] = [{"name": "fit", "fit": {}}]
    (folder / "fit.yaml").write_text(yaml.safe_dump(recipe))
    with devices_of_linear_layers() as devices:
        mllm.train(str(folder / "fit.yaml"), out=folder / "fitted")
    assert "cuda" in devices


# bitsandbytes' models, which transformers puts on the GPU by itself while the encoder stays where it was.


@planned("a quantized language model, which transformers puts on the GPU by itself", raises=RuntimeError)
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
