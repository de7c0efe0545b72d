"""Trace a computation's peak memory and FLOPs by running the real code on tensors without values.

The weights and features are `FakeTensor`s: they have shapes, types and lifetimes as real ones have, and no memory. What
is small and decides the control flow (ids, masks, labels) is real. So the figures follow the code, without a formula.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count


@dataclass(frozen=True)
class Cost:
    """The cost of a computation."""

    peak: int = 0  # bytes allocated at once, over those before
    flops: int = 0  # a multiply-add is two; of matrix products, convolutions and attention


class Paper:
    """Make tensors and modules without values."""

    def __init__(self) -> None:
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return a tensor of a shape and no values."""
        with self.mode:
            return torch.empty(shape, dtype=dtype)

    def put(self, module: nn.Module) -> None:
        """Replace a module's tensors, which may be on the meta device, by ones without values; tied ones stay tied."""
        made: dict[int, tuple[Tensor, Tensor]] = {}  # the old tensor is kept, so that no other gets its id
        for inner in module.modules():
            tables: tuple[dict[str, Any], ...] = (inner._parameters, inner._buffers, vars(inner))
            for table in tables:
                for name, tensor in table.items():
                    if isinstance(tensor, Tensor):
                        if id(tensor) not in made:
                            made[id(tensor)] = tensor, self._like(tensor)
                        table[name] = made[id(tensor)][1]

    def _like(self, tensor: Tensor) -> Tensor:
        new = self.empty(*tensor.shape, dtype=tensor.dtype)
        return nn.Parameter(new, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else new


def cost(compute: Callable[[], Any]) -> Cost:
    """Return the cost of a computation; its result is dropped."""
    with _Meter() as meter:
        compute()
    return Cost(peak=meter.peak, flops=meter.flops)


class _Meter(TorchDispatchMode):
    """Adds up the FLOPs of every operation, and the bytes of every storage that is made until it is dropped."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = self.flops = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:  # most calls: torch asks each tensor for its device many times
            return func(*args)
        kwargs = kwargs or {}
        if func._overloadpacket in _INDEXED and len(args) > 1:
            args = (args[0], _counted(args[1]), *args[2:])
        made = func(*args, **kwargs)
        results = [one for one in (made if isinstance(made, tuple | list) else (made,)) if isinstance(one, Tensor)]
        if results and not func.is_view:
            given = {_key(one) for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)}  # changed in place
            for tensor in results:
                if _key(tensor) not in given:
                    self._note(tensor)
        formula = _FORMULAS.get(func._overloadpacket)
        if formula is not None:
            self.flops += formula(*args, **kwargs, out_val=made)
        return made

    def _note(self, tensor: Tensor) -> None:
        storage, key = tensor.untyped_storage(), _key(tensor)
        if key in self._known:
            return
        size = storage.nbytes()
        self._known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._drop, key, size).atexit = False

    def _drop(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


def _counted(indices: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Return indices with real masks as positions, so that the result has a known size."""
    known: list[Tensor | None] = []
    for index in indices:
        real = index is not None and not isinstance(index, FakeTensor)
        known += index.nonzero(as_tuple=True) if real and index.dtype == torch.bool else [index]  # type: ignore[union-attr]
    return known


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query.shape, key.shape, value.shape))


def _attention_backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return int(sdpa_backward_flop_count(grad.shape, query.shape, key.shape, value.shape))


# torch's formulas for attention on GPUs hold for CPUs, too.
_FORMULAS = {
    **flop_registry,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
_INDEXED = {torch.ops.aten.index, torch.ops.aten.index_put, torch.ops.aten.index_put_, torch.ops.aten._index_put_impl_}
