"""Training on one GPU: the losses of a CPU, resumed bit for bit, and weights that FSDP divides again."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

import mllm
from mllm.training.train import train

pytestmark = pytest.mark.gpu


def relative(losses: list[float], expected: list[float]) -> float:
    """Return the largest relative difference of losses."""
    return max(abs(a - b) / abs(b) for a, b in zip(losses, expected, strict=True))


@pytest.mark.timeout(90)
def test_the_losses_are_those_of_a_cpu(workplace, trained, figures):
    command = [sys.executable, "-m", "mllm", "train", workplace.recipe("cpu"), "--out", str(workplace.folder / "cpu")]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"}
    subprocess.run(command, env=environment, check=True, capture_output=True)
    expected = workplace.losses("cpu")
    assert len(expected) == 10
    figures["float32, largest relative difference of 10 losses"] = relative(workplace.losses("float32"), expected)
    assert relative(workplace.losses("float32"), expected) < 1e-4


@pytest.mark.timeout(60)
def test_the_losses_in_bfloat16_are_close_to_those_of_float32(workplace, trained, figures):
    losses = workplace.train("bfloat16", precision="auto")
    figures["bfloat16, largest relative difference of 10 losses"] = relative(losses, workplace.losses("float32"))
    assert relative(losses, workplace.losses("float32")) < 3e-2


@pytest.mark.timeout(60)
@pytest.mark.parametrize("optimizer", ["adamw", "adamw-8bit", "paged-adamw", "paged-adamw-8bit"])
def test_a_run_that_is_killed_continues_to_the_same_losses(workplace, optimizer):
    names = [f"{name}-{optimizer}" for name in ("whole", "killed")]
    lora = {"adapters": "[{type: lora, r: 4, dropout: 0.1}]", "train": "{connector: 1.0e-3, adapters: 2.0e-4}"}
    lora["optimizer"] = optimizer
    whole = workplace.train(names[0], **lora, steps=20, checkpoint_every=10)
    steps = 0

    def interrupts(*_: object) -> None:
        nonlocal steps
        steps += 1
        if steps == 15:
            raise KeyboardInterrupt

    handle = register_optimizer_step_pre_hook(interrupts)
    try:
        with pytest.raises(KeyboardInterrupt):
            workplace.train(names[1], **lora, steps=20, checkpoint_every=10)
    finally:
        handle.remove()
    train(str(workplace.folder / f"{names[1]}.yaml"), resume=workplace.folder / names[1])
    assert len(whole) == 20
    assert workplace.losses(names[1]) == whole


@pytest.mark.timeout(100)
def test_fsdp_divides_the_layers_again_after_a_forward_pass(workplace, device, figures):
    script = str(Path(__file__).with_name("fsdp_states.py"))
    command = [sys.executable, script, str(workplace.parts / "lm"), device]
    environment = {**os.environ, **({"ACCELERATE_USE_CPU": "true"} if device == "cpu" else {})}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=90)
    lines = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("STATES")]
    if not lines:
        raise RuntimeError(done.stderr[-300:])
    figures["layers after a forward pass"] = lines[0]
    assert set(lines[0]) == {"SHARDED"}


def test_a_model_that_is_built_leaves_the_devices_generator_as_it_was(workplace, device):
    if device == "cpu":
        pytest.skip("a CPU's generator is another one")
    torch.cuda.manual_seed(7)
    before = torch.cuda.get_rng_state()
    mllm.assemble({"model": str(workplace.parts / "clip"), "init": "random"}, str(workplace.parts / "lm"), "mlp")
    assert torch.equal(torch.cuda.get_rng_state(), before)
