"""A pretend CUDA device: a CPU plays it, tensors of two devices do not mix, and synchronizations are counted."""

from __future__ import annotations

import contextlib
import traceback
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CUDA = torch.device("cuda", 0)
COPIES = {torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default}
INDEXING = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_", "aten::_unsafe_index"}
SCALAR = "aten::_local_scalar_dense"
SYNCHRONIZING = {  # a CPU waits for the size or the value that a GPU computes
    SCALAR,
    "aten::equal",
    "aten::is_nonzero",
    "aten::item",
    "aten::masked_select",
    "aten::nonzero",
    "aten::unique_consecutive",
    "aten::unique_dim",
    "aten::_unique2",
}
PACKAGE = ("/mllm/", "/adapters/", "/eval/")


class PretendGPU:
    """A CUDA device that a CPU plays: the storages of its tensors are marked.

    Attributes:
        synchronizations: by name of the operation and place in the code, how often a CPU would wait.
        copies: the same of copies from one device to the other.
        pinned: how often pinned memory of the host was asked for.
    """

    def __init__(self) -> None:
        self._storages: set[int] = set()
        self.synchronizations: Counter[tuple[str, str]] = Counter()
        self.copies: Counter[tuple[str, str]] = Counter()
        self.pinned = 0

    def holds(self, tensor: Tensor) -> bool:
        """Whether a tensor is on the device."""
        try:
            return tensor.untyped_storage()._cdata in self._storages
        except NotImplementedError:  # a tensor without storage
            return False

    def mark(self, values: Any) -> Any:
        """Put the tensors among values on the device, and return the values."""
        for tensor in _tensors(values):
            storage = tensor.untyped_storage()
            if storage._cdata not in self._storages:
                self._storages.add(storage._cdata)
                weakref.finalize(storage, self._storages.discard, storage._cdata).atexit = False
        return values

    def moved(self, tensor: Tensor, to_gpu: bool) -> Tensor:
        """Return a tensor's copy on the device, or on the CPU."""
        self.copies["to the GPU" if to_gpu else "to the CPU", _place()] += 1
        leaf = isinstance(tensor, torch.nn.Parameter) or not tensor.requires_grad
        copy = tensor.detach().clone() if leaf else tensor.clone()
        if to_gpu:
            return self.mark(copy)
        self._storages.discard(copy.untyped_storage()._cdata)
        return copy

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Let torch see the device inside the block."""
        with _Functions(self), _Operations(self):
            yield


class _Operations(TorchDispatchMode):
    """Refuses operations on tensors of two devices, and marks the results of those on the pretend device."""

    def __init__(self, gpu: PretendGPU) -> None:
        super().__init__()
        self.gpu = gpu

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs, name = kwargs or {}, func._schema.name
        tensors = _tensors((args, kwargs))
        on_gpu = any(map(self.gpu.holds, tensors))
        if on_gpu and func not in COPIES:
            self._check(name, args, tensors)
            if name in SYNCHRONIZING:
                self.gpu.synchronizations[name, _place()] += 1
        result = func(*args, **kwargs)
        stays = self.gpu.holds(tensors[0]) if func is torch.ops.aten._to_copy.default else func not in COPIES
        return self.gpu.mark(result) if on_gpu and stays and name != SCALAR else result

    def _check(self, name: str, args: Sequence[Any], tensors: Sequence[Tensor]) -> None:
        """Raise, as CUDA does, where tensors of two devices meet; numbers and indices of a CPU are allowed."""
        if name in INDEXING:
            own, indices = self.gpu.holds(args[0]), _tensors(args[1])
            if not own and any(map(self.gpu.holds, indices)):
                raise RuntimeError(f"{name}: indices on the pretend GPU, the tensor on the CPU, at {_place()}")
            for index in indices:
                if own and not self.gpu.holds(index):
                    self.gpu.copies["to the GPU", _place()] += 1
                elif index.dtype == torch.bool:
                    self.gpu.synchronizations["index by a mask", _place()] += 1
            tensors = [args[0], *_tensors(args[2:3])]
        devices = {self.gpu.holds(tensor) for tensor in tensors if tensor.dim() or self.gpu.holds(tensor)}
        if len(devices) > 1:
            raise RuntimeError(f"{name}: tensors on the pretend GPU and on the CPU, at {_place()}")


class _Functions(TorchFunctionMode):
    """Reads devices that calls name, and answers what tensors say of their device."""

    def __init__(self, gpu: PretendGPU) -> None:
        super().__init__()
        self.gpu = gpu

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        getter: Any = getattr(func, "__self__", None)
        on_gpu = bool(args) and isinstance(args[0], Tensor) and self.gpu.holds(args[0])
        if getter is Tensor.device:
            return CUDA if on_gpu else func(*args)
        if getter is Tensor.is_cuda:
            return on_gpu
        if getter is Tensor.is_cpu:
            return not on_gpu
        if func is Tensor.get_device:
            return 0 if on_gpu else -1
        if func in (Tensor.to, Tensor.cuda, Tensor.cpu):
            return self._to(func, *args, **kwargs)
        if func is Tensor.pin_memory:  # a CPU has none
            self.gpu.pinned += 1
            return args[0]
        if func is Tensor.numpy and on_gpu:
            raise TypeError(f"can't convert a tensor of the pretend GPU to numpy, at {_place()}")
        if func is Tensor.tolist and on_gpu:
            self.gpu.synchronizations["tolist", _place()] += 1
            with torch._C.DisableTorchFunction():
                return torch.Tensor.tolist(self.gpu.moved(args[0], False))
        named = _is_cuda(kwargs.get("device"))
        if named:
            if kwargs.get("generator") is not None:
                raise RuntimeError(f"a generator of the CPU for the pretend GPU, at {_place()}")
            kwargs["device"] = "cpu"
        inherits = getattr(func, "__name__", "") == "new_tensor" and "device" not in kwargs and on_gpu
        result = func(*args, **kwargs)
        return self.gpu.mark(result) if named or inherits else result

    def _to(self, func: Any, tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return what `to`, `cuda` or `cpu` returns."""
        if any(_is_meta(value) for value in (*args[:1], kwargs.get("device"))):
            return Tensor.to(tensor, *args, **kwargs)
        source = self.gpu.holds(tensor)
        target, types = source, [value for value in (*args, *kwargs.values()) if isinstance(value, torch.dtype)]
        if func is not Tensor.to:
            target = func is Tensor.cuda
        for value in (*args[:1], *(kwargs[name] for name in ("device", "other") if name in kwargs)):
            if isinstance(value, Tensor):
                target, types = self.gpu.holds(value), [value.dtype]
            elif isinstance(value, str | int | torch.device) and not isinstance(value, bool):
                target = _is_cuda(value)
        options: dict[str, Any] = {"dtype": types[0]} if types else {}
        if kwargs.get("copy"):
            options["copy"] = True
        result = Tensor.to(tensor, **options) if options else tensor
        return result if target == source else self.gpu.moved(result, target)


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def _is_meta(value: Any) -> bool:
    return isinstance(value, str | torch.device) and torch.device(value).type == "meta"


def _is_cuda(device: Any) -> bool:
    return device is not None and (isinstance(device, int) or torch.device(device).type == "cuda")


def _place() -> str:
    """Return the line of the package that runs, or of whoever runs."""
    lines = [
        f"{frame.f_code.co_filename}:{line}"
        for frame, line in traceback.walk_stack(None)
        if frame.f_code.co_filename != __file__
    ]
    ours = (line for line in lines if any(part in line for part in PACKAGE))
    return next(ours, next(line for line in lines if "/torch/" not in line))


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, fresh_accelerator: None) -> Iterator[PretendGPU]:
    """Let torch and accelerate see a CUDA device, which is a pretend one."""
    import bitsandbytes  # noqa: F401 -- imported later it would look for the real device

    answers: dict[str, Any] = {
        "is_available": True,
        "is_initialized": True,
        "is_bf16_supported": True,
        "device_count": 1,
        "current_device": 0,
        "get_device_name": "pretend GPU",
        "get_device_capability": (9, 0),
        "get_device_properties": SimpleNamespace(total_memory=80 * 2**30),
        "current_stream": SimpleNamespace(synchronize=lambda: None),
        "set_device": None,
        "synchronize": None,
        "empty_cache": None,
        "reset_peak_memory_stats": None,
        "max_memory_allocated": 2**30,
        "manual_seed_all": None,
        "get_rng_state": torch.get_rng_state(),
        "set_rng_state": None,
    }

    def answering(value: Any) -> Callable[..., Any]:
        return lambda *args, **options: value

    for name, value in answers.items():
        monkeypatch.setattr(torch.cuda, name, answering(value))
    device, empty = PretendGPU(), torch.empty

    def unpinned(*args: Any, pin_memory: bool = False, **options: Any) -> Tensor:
        device.pinned += bool(pin_memory)
        return empty(*args, **options)

    monkeypatch.setattr(torch, "empty", unpinned)  # in every thread
    with device.running():
        yield device
