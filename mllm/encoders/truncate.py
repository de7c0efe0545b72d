"""Cut a tower after the layer that is used: what comes behind is not computed, and its weights are dropped.

Notable: nothing is known of the model. It runs once, and the tensor that is wanted is looked for among what its modules
returned. From then on the forward ends right there, by an exception, with the very tensor it had before: equal to the
bit. What had not run by then, and no used weight belongs to, is taken out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


class Reached(Exception):
    """Carries the wanted tensor out of a forward that ends early."""

    def __init__(self, tensor: Tensor) -> None:
        super().__init__()
        self.tensor = tensor


def until(run: Callable[[], Tensor]) -> Tensor:
    """Return what ``run`` computes, or the tensor at which a cut model ends."""
    try:
        return run()
    except Reached as reached:
        return reached.tensor


def cut(model: nn.Module, run: Callable[[], Tensor]) -> tuple[Tensor, bool]:
    """Let a model's forward end at the tensor that ``run`` returns, and drop what is not needed for it.

    Args:
        model: everything that ``run`` calls.
        run: calls the model and takes the wanted tensor from its output.

    Returns:
        The tensor, and whether the forward now ends there: where no module returns that very tensor, it runs on.
    """
    trace = _Trace()
    hooks = [hook for module in model.modules() for hook in trace.hooks(module)]
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        for parameter in flags:
            parameter.requires_grad_(parameter.is_floating_point())
        with torch.enable_grad():
            wanted = run()
        used = _weights_behind(wanted)
    finally:
        for hook in hooks:
            hook.remove()
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)
    end = trace.end(wanted)
    if end is not None:
        place = end.place  # `end` itself holds the tensor, and with it all that was computed here
        end.module.register_forward_hook(lambda _module, _inputs, output: _stop(output, place))
    if used:  # else the model computes without a graph, and nothing is known of its weights
        _drop(model, trace.entered(until=end), used)
    return wanted.detach(), end is not None


@dataclass(frozen=True)
class _Made:
    """A tensor that a module returned, itself or at a place of a tuple."""

    module: nn.Module
    place: int | None
    tensor: Tensor
    version: int  # in-place operations count it up


@dataclass
class _Trace:
    """What happened in a forward, in order: a module was entered, a tensor was made."""

    events: list[nn.Module | _Made] = field(default_factory=list)

    def hooks(self, module: nn.Module) -> list[Any]:
        def entered(module: nn.Module, _inputs: Any) -> None:
            self.events.append(module)

        def left(module: nn.Module, _inputs: Any, output: Any) -> None:
            places = enumerate(output) if isinstance(output, tuple) else [(None, output)]
            self.events += [_Made(module, p, t, t._version) for p, t in places if isinstance(t, Tensor)]

        return [module.register_forward_pre_hook(entered), module.register_forward_hook(left)]

    def end(self, wanted: Tensor) -> _Made | None:
        """Return the first place where the tensor was as it was in the end, in a module that ran once."""
        calls = Counter(id(event) for event in self.events if isinstance(event, nn.Module))
        made = [event for event in self.events if isinstance(event, _Made) and event.tensor is wanted]
        fit = (made for made in made if made.version == wanted._version and calls[id(made.module)] == 1)
        return next(fit, None)

    def entered(self, until: _Made | None) -> set[nn.Module]:
        """Return the modules that were entered before a tensor was made; None: all that were."""
        last = len(self.events) if until is None else next(i for i, event in enumerate(self.events) if event is until)
        return {event for event in self.events[:last] if isinstance(event, nn.Module)}


def _stop(output: Any, place: int | None) -> None:
    raise Reached(output if place is None else output[place])


def _weights_behind(tensor: Tensor) -> set[Tensor]:
    """Return the parameters a tensor was computed from, read off the graph: no gradient is computed."""
    found, seen, left = set(), set(), [tensor.grad_fn]
    while left:
        node = left.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(node.variable)
        left += [following for following, _ in node.next_functions]
    return found


def _drop(module: nn.Module, entered: set[nn.Module], used: set[Tensor]) -> None:
    """Replace what has weights, was not entered, and has no used weight."""
    for name, child in module.named_children():
        weights = set(child.parameters())
        if weights and not weights & used and entered.isdisjoint(child.modules()):
            setattr(module, name, nn.Identity())
        else:
            _drop(child, entered, used)
