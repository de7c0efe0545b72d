"""Every command computes where torch has a GPU, here a pretend one, or where --device says."""

from __future__ import annotations

import contextlib
import io
import json
import sys
import threading
from collections.abc import Iterator
from importlib import import_module
from typing import Any

import pytest
import torch
import yaml
from torch.nn.modules.module import register_module_forward_pre_hook

import mllm
import mllm.build
from mllm.__main__ import main
from mllm.testing import tiny_image


@contextlib.contextmanager
def linear_layers(gpu: Any) -> Iterator[set[tuple[str, torch.dtype]]]:
    """Collect the devices that linear layers compute on, and the types of their weights, once the parts are loaded."""
    kinds: set[tuple[str, torch.dtype]] = set()
    loading = 0

    def quietly(load: Any) -> Any:
        def loads(*args: Any, **options: Any) -> Any:
            nonlocal loading
            loading += 1
            try:
                return load(*args, **options)
            finally:
                loading -= 1

        return loads

    def collect(module: torch.nn.Module, args: Any) -> None:
        if not isinstance(module, torch.nn.Linear) or loading:
            return
        kinds.add(("cuda" if gpu.holds(module.weight) else "cpu", module.weight.dtype))
        if threading.current_thread() is threading.main_thread():  # elsewhere torch does not see the device
            kinds.add((args[0].device.type, module.weight.dtype))

    handle = register_module_forward_pre_hook(collect)
    try:
        with pytest.MonkeyPatch.context() as patches:
            for name in ("build_encoder", "build_lm"):  # which try their part once
                patches.setattr(f"mllm.build.{name}", quietly(getattr(mllm.build, name)))
            yield kinds
    finally:
        handle.remove()


@pytest.fixture
def folder(tiny_model, tiny_parts, tmp_path, monkeypatch):
    """A folder with a saved model that has a head, an image, a suite and a recipe."""
    tiny_model(heads=[{"type": "retrieval", "dim": 6}], device="cpu").save(tmp_path / "run")
    tiny_image(1).save(tmp_path / "a.png")
    (tmp_path / "rows.json").write_text(json.dumps([{"image": "a.png", "question": "q", "answer": "x"}] * 2))
    (tmp_path / "captions.json").write_text(json.dumps([{"image": "a.png", "caption": "x"}] * 2))
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
    (tmp_path / "fit.yaml").write_text(
        yaml.safe_dump(
            {
                **recipe,
                "data": {"train": {"format": "table", "path": str(tmp_path / "captions.json")}},
                "stages": [{"name": "fit", "fit": {}}],
            }
        )
    )
    monkeypatch.chdir(tmp_path)
    return tmp_path


FEW = ("--max-new-tokens", "2")
COMMANDS = {
    "train": ("train", "recipe.yaml", "--out", "trained"),
    "fit": ("train", "fit.yaml", "--out", "fitted"),
    "caption": ("caption", "run", "a.png", *FEW),
    "ask": ("ask", "run", "a.png", "what?", *FEW),
    "chat": ("chat", "run", *FEW),
    "serve": ("serve", "run", "--port", "0"),
    "eval": ("eval", "run", "--suite", "suite.yaml", "--data", ".", "--baselines", "none", "--out", "eval"),
    "index build": ("index", "build", "a.png", "photos.index", "--run", "run"),
    "index find": ("index", "find", "photos.index", "a cat", "--run", "run"),
}


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    """Run a command, whose exit status has to be 0."""

    def answers_once(model: Any, *_: Any) -> Any:
        model.generate([["hello"]], max_new_tokens=2)

    monkeypatch.setattr(sys, "argv", ["mllm", *arguments])
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n"))
    monkeypatch.setattr("mllm.serve.app.create_app", answers_once)
    monkeypatch.setattr("mllm.serve.connection.run", lambda *_: None)
    try:
        main()
    except SystemExit as end:
        assert not end.code


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
@pytest.mark.parametrize(("named", "device"), [((), "cuda"), (("--device", "cpu"), "cpu")], ids=["default", "cpu"])
def test_a_command_computes_on_the_device(gpu, folder, monkeypatch, command, named, device):
    if command[:2] == ("index", "find"):
        run(monkeypatch, *COMMANDS["index build"], *named)
    with linear_layers(gpu) as kinds:
        run(monkeypatch, *command, *named)
    assert {name for name, _ in kinds} == {device}


@pytest.mark.parametrize("command", [COMMANDS[name] for name in list(COMMANDS)[2:]], ids=list(COMMANDS)[2:])
def test_a_command_computes_in_the_type_that_is_named(gpu, folder, monkeypatch, command):
    if command[:2] == ("index", "find"):
        run(monkeypatch, *COMMANDS["index build"], "--dtype", "bfloat16")
    with linear_layers(gpu) as kinds:
        run(monkeypatch, *command, "--dtype", "bfloat16")
    assert ("cuda", torch.bfloat16) in kinds  # connectors and heads stay in float32
    assert {name for name, _ in kinds} == {"cuda"}


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--device", "cuda", "torch sees 0 of the kind cuda"),
        ("--device", "gpu", "There is no device 'gpu'"),
        ("--dtype", "bf16", "There is no dtype 'bf16'"),
    ],
)
def test_what_is_not_there_is_an_error(folder, monkeypatch, fresh_accelerator, option, value, message):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(sys, "argv", ["mllm", *COMMANDS["caption"], option, value])
    with pytest.raises(SystemExit) as end:
        main()
    assert message in str(end.value.code)


def test_a_training_in_python_is_told_the_device(gpu, folder):
    with linear_layers(gpu) as kinds:
        mllm.train("recipe.yaml", out="trained", device="cpu")
    assert {name for name, _ in kinds} == {"cpu"}


def test_the_bench_compares_two_models_of_one_device(gpu, tiny_parts, tmp_path):
    size = {"hidden_size": 24, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    shapes, generate = (import_module(f"mllm.eval.bench.{name}") for name in ("shapes", "generate"))
    ours, stock = shapes.llava(tmp_path / "vision", size={**size, "image_size": 32}, lm=tiny_parts[1])
    assert {parameter.device.type for model in (ours, stock) for parameter in model.parameters()} == {"cuda"}
    generate.agree(ours, stock, print)
