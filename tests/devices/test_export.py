"""An export of a model on a GPU, here a pretend one: it is made on the CPU, and the model stays where it was."""

from __future__ import annotations

import pytest
from safetensors.torch import load_file
from torch import equal

import mllm
from mllm.export.export import export


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_on_the_device_is_exported_as_on_the_cpu(dtype, tiny_clip, tiny_parts, gpu, tmp_path):
    model = mllm.assemble({"model": tiny_clip, "layer": -1}, tiny_parts[1], "mlp", device="cpu")
    export(model, tmp_path / "cpu", to="hf-llava", dtype=dtype)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.to("cuda")
    export(model, tmp_path / "gpu", to="hf-llava", dtype=dtype)
    assert {tensor.device.type for tensor in model.state_dict().values()} == {"cuda"}
    assert all(equal(tensor.cpu(), before[name]) for name, tensor in model.state_dict().items())
    cpu, exported = (load_file(tmp_path / name / "model.safetensors") for name in ("cpu", "gpu"))
    assert cpu.keys() == exported.keys()
    assert all(equal(cpu[name], exported[name]) for name in cpu)
