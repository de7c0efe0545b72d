"""The pretend CUDA device does what a real one does: it holds tensors, refuses to mix them, and counts."""

from __future__ import annotations

import pytest
import torch


def test_tensors_say_where_they_are(gpu):
    tensor = torch.ones(2, device="cuda")
    assert tensor.device == (tensor + 1).device == torch.ones(2).to(tensor.device).device == torch.device("cuda", 0)
    assert tensor.is_cuda and not tensor.cpu().is_cuda
    assert torch.ones(2).device == tensor.cpu().device == torch.device("cpu")
    with torch.device("cuda"):
        assert torch.zeros(2).is_cuda
    assert tensor.new_tensor([1.0]).is_cuda and torch.zeros_like(tensor).is_cuda


def test_a_module_and_its_gradients_move(gpu):
    linear = torch.nn.Linear(2, 2).to("cuda")
    linear(torch.ones(1, 2, device="cuda")).sum().backward()
    assert linear.weight.is_cuda
    assert linear.weight.grad is not None and linear.weight.grad.is_cuda
    with pytest.raises(RuntimeError, match="pretend GPU and on the CPU"):
        linear(torch.ones(1, 2))
    assert not linear.cpu().weight.is_cuda


def test_tensors_of_two_devices_do_not_mix(gpu):
    here, there = torch.ones(2), torch.ones(2, device="cuda")
    with pytest.raises(RuntimeError, match="pretend GPU and on the CPU"):
        here + there
    with pytest.raises(RuntimeError, match="indices on the pretend GPU"):
        here[torch.tensor([0], device="cuda")]
    with pytest.raises(TypeError, match="numpy"):
        there.numpy()
    assert torch.equal((there * torch.tensor(2.0)).cpu(), torch.full((2,), 2.0))  # a number of the CPU is allowed
    assert there[torch.tensor([0])].is_cuda


def test_synchronizations_and_copies_are_counted(gpu):
    tensor = torch.arange(4, device="cuda")
    assert not gpu.synchronizations
    assert int(tensor.sum()) == 6 and tensor.tolist() == [0, 1, 2, 3]
    tensor[tensor > 1].to("cpu")
    assert {name for name, _ in gpu.synchronizations} == {"aten::_local_scalar_dense", "tolist", "index by a mask"}
    assert all(place.startswith(__file__) for _, place in gpu.synchronizations)
    assert [name for name, _ in gpu.copies].count("to the CPU") >= 1
