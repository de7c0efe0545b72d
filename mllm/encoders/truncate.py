"""Truncate a model after the layer that is used: later layers are not computed, and their weights are dropped.

This works for any model. The model runs once, and the desired tensor is searched among the outputs of its modules.
From then on the forward pass ends at that module, by an exception that carries the tensor, so the result is
bit-identical. Modules that had not run by then and contain no used weight are removed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


class Reached(Exception):
    """Carries the desired tensor out of a forward pass that ends early."""

    def __init__(self, tensor: Tensor) -> None:
        super().__init__()
        self.tensor = tensor


def run_truncated(run: Callable[[], Tensor]) -> Tensor:
    """Return the result of ``run``, or the tensor at which a truncated model ends."""
    try:
        return run()
    except Reached as reached:
        return reached.tensor


def truncate(model: nn.Module, run: Callable[[], Tensor]) -> tuple[Tensor, bool]:
    """Make a model's forward pass end at the tensor that ``run`` returns, and drop the modules it does not need.

    Args:
        model: contains every module that ``run`` calls.
        run: calls the model and returns the desired tensor of its output.

    Returns:
        The tensor, and whether the forward pass now ends there; it does not if no module returns this tensor itself.
    """
    trace = _Trace()
    hooks = [hook for module in model.modules() for hook in trace.hooks(module)]
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        for parameter in flags:
            parameter.requires_grad_(parameter.is_floating_point())
        with torch.enable_grad():
            target = run()
        used = _weights_of(target)
    finally:
        for hook in hooks:
            hook.remove()
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)
    end = trace.end(target)
    if end is not None:
        index = end.index  # the hook must not refer to `end`, whose tensor keeps the whole graph in memory
        end.module.register_forward_hook(lambda _module, _inputs, output: _stop(output, index))
    if used:  # without an autograd graph, it is unknown which weights are used
        _drop(model, trace.entered(until=end), used)
    return target.detach(), end is not None


@dataclass(frozen=True)
class _Output:
    """A tensor that a module returned, by itself or as an element of a tuple."""

    module: nn.Module
    index: int | None  # in the tuple; None: the output is the tensor
    tensor: Tensor
    version: int  # in-place operations increase it


@dataclass
class _Trace:
    """The events of a forward pass in order: modules entered and tensors returned."""

    events: list[nn.Module | _Output] = field(default_factory=list)

    def hooks(self, module: nn.Module) -> list[Any]:
        def entered(module: nn.Module, _inputs: Any) -> None:
            self.events.append(module)

        def returned(module: nn.Module, _inputs: Any, output: Any) -> None:
            tensors = enumerate(output) if isinstance(output, tuple) else [(None, output)]
            self.events += [_Output(module, i, t, t._version) for i, t in tensors if isinstance(t, Tensor)]

        return [module.register_forward_pre_hook(entered), module.register_forward_hook(returned)]

    def end(self, target: Tensor) -> _Output | None:
        """Return the first output that is the target with its final values, of a module that ran once."""
        calls = Counter(id(event) for event in self.events if isinstance(event, nn.Module))
        outputs = [event for event in self.events if isinstance(event, _Output) and event.tensor is target]
        final = (output for output in outputs if output.version == target._version and calls[id(output.module)] == 1)
        return next(final, None)

    def entered(self, until: _Output | None) -> set[nn.Module]:
        """Return the modules that were entered before an output was returned; None: all modules entered."""
        last = len(self.events) if until is None else next(i for i, event in enumerate(self.events) if event is until)
        return {event for event in self.events[:last] if isinstance(event, nn.Module)}


def _stop(output: Any, index: int | None) -> None:
    raise Reached(output if index is None else output[index])


def _weights_of(tensor: Tensor) -> set[Tensor]:
    """Return the parameters that a tensor was computed from, read from the autograd graph without a backward pass."""
    weights, visited, queue = set(), set(), [tensor.grad_fn]
    while queue:
        node = queue.pop()
        if node is None or node in visited:
            continue
        visited.add(node)
        if hasattr(node, "variable"):
            weights.add(node.variable)
        queue += [following for following, _ in node.next_functions]
    return weights


def _drop(module: nn.Module, entered: set[nn.Module], used: set[Tensor]) -> None:
    """Replace modules that have weights, none of them used, and were not entered."""
    for name, child in module.named_children():
        weights = set(child.parameters())
        if weights and not weights & used and entered.isdisjoint(child.modules()):
            setattr(module, name, nn.Identity())
        else:
            _drop(child, entered, used)
