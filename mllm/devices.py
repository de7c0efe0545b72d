"""Choose the device that a process computes on, and the type of the frozen weights.

Without a choice it is a GPU where torch has one: CUDA, or MPS on a Mac; else the CPU. accelerate decides, so that each
of several processes has a GPU of its own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from mllm.errors import MLLMError, near
from mllm.processes import processes

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

DeviceName = str | torch.device
DTypeName = str | torch.dtype


def choose_device(name: DeviceName | None = None) -> torch.device:
    """Return the device of a name (``cuda``, ``cuda:1``, ``mps``, ``cpu``); None: the device of this process.

    Raises:
        MLLMError: torch knows no such device, or there is none on this machine.
    """
    if name is None:
        device: torch.device = processes().device
        return device
    try:
        device = torch.device(name)
        count = torch.get_device_module(device).device_count()
    except RuntimeError:
        raise MLLMError(f"There is no device {str(name)!r}. Expected cpu, cuda, cuda:1, ... or mps.") from None
    if (device.index or 0) >= count:
        raise MLLMError(
            f"The device is {str(name)!r}, and torch sees {count} of the kind {device.type} on this machine. Leave it "
            f"out to use {processes().device}, or name another one."
        )
    return device


def use_device(name: DeviceName | None) -> None:
    """Let this process compute on a device, wherever none is named; None changes nothing.

    Raises:
        MLLMError: there is no such device, or the launcher has given each of several processes its own.
    """
    if name is None:
        return
    state, device = processes(), choose_device(name)
    if state.num_processes > 1:
        raise MLLMError(
            f"The device is {str(name)!r}, and the launcher has given each of {state.num_processes} processes its own. "
            "Leave it out; `accelerate launch --cpu` starts processes that compute on CPUs."
        )
    state.device = device


def computes_in_bfloat16(device: torch.device) -> bool:
    """Whether a device is a GPU whose matrix products are bfloat16's own, not emulated."""
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def dtype_of(name: DTypeName) -> torch.dtype:
    """Return the dtype of a name: float32, bfloat16 or float16.

    Raises:
        MLLMError: another name.
    """
    key = str(name).removeprefix("torch.")
    if key not in DTYPES:
        raise MLLMError(f"There is no dtype {str(name)!r} for weights. {near(key, DTYPES)}")
    return DTYPES[key]


def pinned(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor of the host in pinned memory, if it is to be copied to a GPU."""
    copied = device.type == "cuda" and tensor.device.type == "cpu" and torch.cuda.is_initialized()
    return tensor.pin_memory() if copied else tensor


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor on a device; the host does not wait for its copy to a GPU."""
    return pinned(tensor, device).to(device, non_blocking=True)


@contextlib.contextmanager
def forked_rng(seed: int | None = None) -> Iterator[None]:
    """Restore torch's generators afterwards, that of the GPU included, which `torch.manual_seed` sets, too.

    ``seed``: start them with it.
    """
    with torch.random.fork_rng(devices=[torch.cuda.current_device()] if torch.cuda.is_initialized() else []):
        if seed is not None:
            torch.manual_seed(seed)
        yield


def cast(module: nn.Module, dtype: torch.dtype) -> None:
    """Convert weights to a dtype in place, and what is saved with them; quantized weights stay as they are.

    Tables that a model computes when it is built, such as the frequencies of rotary embeddings, are not saved with it:
    they keep their precision.
    """
    for part in module.modules():
        saved = [buffer for name, buffer in part._buffers.items() if name not in part._non_persistent_buffers_set]
        for tensor in (*part._parameters.values(), *saved):
            if tensor is not None and tensor.is_floating_point():
                tensor.data = tensor.data.to(dtype)


def give_memory(module: nn.Module, device: torch.device) -> None:
    """Give a module's tensors on the meta device memory on another one, without values; others stay as they are."""
    for part in module.modules():
        if any(tensor.is_meta for tensor in (*part.parameters(recurse=False), *part.buffers(recurse=False))):
            part.to_empty(device=device, recurse=False)


def has_values(tensor: Tensor) -> bool:
    """Whether a tensor has values: not on the meta device, nor where a plan only traces shapes."""
    return not (tensor.is_meta or isinstance(tensor, FakeTensor))
