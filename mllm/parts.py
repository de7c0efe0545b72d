"""Hold the parts of a model, and find them by their kinds and paths."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from mllm.capabilities import missing
from mllm.config.parts import FROZEN
from mllm.errors import MLLMError, near
from mllm.hub.fingerprints import tensor_hash
from mllm.lms.shared_prefix import SharedPrefixes

Kind = TypeVar("Kind")


class Parts(nn.Module):
    """The parts that a model is joined from; `mllm.model.Model` runs a batch through them. An absent part is None."""

    # Parts are found by their contracts (mllm.slots), not by their classes, so their static type is Any.
    encoder: Any
    connector: Any
    lm: Any
    tokens: Any
    decoder: Any
    spec: Any  # an AssemblySpec; its parts may be None
    adapters: nn.ModuleList
    heads: nn.ModuleDict
    prefixes: SharedPrefixes  # the KV caches of what many prompts begin with

    @property
    def device(self) -> torch.device:
        """Return the device of the parameters."""
        return next(self.parameters()).device

    def slot(self, name: str) -> nn.Module | None:
        """Return the part in a slot (``encoder``, ``connector``, ``lm``, ``decoder``), or None where it is absent."""
        return self._modules.get(name)

    def parts(self) -> Iterator[tuple[str, nn.Module]]:
        """Yield every part with its path: ``encoder``, ``adapters.0``, ``heads.NAME``, ..."""
        for name in ("encoder", "connector", "lm", "decoder"):
            if (part := self.slot(name)) is not None:
                yield name, part
        yield from ((f"adapters.{number}", adapter) for number, adapter in enumerate(self.adapters))
        yield from ((f"heads.{name}", head) for name, head in self.heads.items())

    def find_all(self, kind: type[Kind]) -> dict[str, Kind]:
        """Return the parts that are of a kind (`mllm.slots`), by their paths."""
        return {path: part for path, part in self.parts() if isinstance(part, kind)}

    def has(self, *kinds: type) -> bool:
        """Whether the model has a part of each kind (`mllm.slots`)."""
        return all(self.find_all(kind) for kind in kinds)

    def find(self, kind: type[Kind]) -> Kind:
        """Return the one part that is of a kind (`mllm.slots`).

        Raises:
            MLLMError: there is none, or there are several, which the message names.
        """
        candidates = self.find_all(kind)
        if not candidates:
            raise MLLMError(f"This model lacks a part: it needs {missing(kind)}.")
        if len(candidates) > 1:
            raise MLLMError(
                f"The model has several parts of the kind {kind.__name__}: {', '.join(candidates)}. Keep one of them."
            )
        return next(iter(candidates.values()))

    @contextlib.contextmanager
    def adapters_off(self) -> Iterator[None]:
        """Turn adapters and new tokens off: on text alone the outputs are then those of the bare language model."""
        with contextlib.ExitStack() as stack:
            for adapter in (*self.adapters, *([self.tokens] if self.tokens is not None else [])):
                stack.enter_context(cast(Any, adapter).off())
            self.prefixes.drop()
            stack.callback(self.prefixes.drop)
            yield

    def frozen_hash(self, part: str, without: Sequence[str] = ()) -> str:
        """Return a hash of all tensors of a part, without those of adapters inside it.

        Args:
            part: its slot.
            without: dotted paths of modules that train, whose tensors are excluded too.
        """
        adapted = {id(parameter) for parameter in self.adapters.parameters()}
        module = self.get_submodule(part)
        excluded = {name for name, p in module.named_parameters(remove_duplicate=False) if id(p) in adapted}
        state = module.state_dict(keep_vars=True)
        trained = {id(tensor) for name, tensor in state.items() if _under(f"{part}.{name}", without)}
        excluded |= {name for name, tensor in state.items() if id(tensor) in trained}  # under all names of tied weights
        return tensor_hash(module, without=excluded)

    def trained_state(self) -> dict[str, Tensor]:
        """Return copies on the CPU of all trained tensors, by dotted name."""
        return {name: tensor.detach().cpu() for name, tensor in self.trained_tensors().items()}

    def trained_tensors(self) -> dict[str, Tensor]:
        """Return all trained tensors by dotted name, on their device or the meta device.

        Tied weights, such as those of input and output embeddings, are one tensor, under the first of their names.
        """
        adapted = {id(tensor) for tensor in self.adapters.state_dict(keep_vars=True).values()}
        names: dict[int, str] = {}
        trained = {}
        for name, tensor in self.state_dict(keep_vars=True).items():
            inside = _under(name, self.spec.trained) and id(tensor) not in adapted
            if (name.split(".")[0] not in FROZEN or inside) and names.setdefault(id(tensor), name) == name:
                trained[name] = tensor
        return trained


def _under(name: str, paths: Sequence[str]) -> bool:
    """Whether a tensor's dotted name is inside one of the modules at these paths."""
    return any(f"{name}.".startswith(f"{path}.") for path in paths)


def trained_module(model: Parts, path: str) -> nn.Module:
    """Return the module that a stage's ``train`` names by a dotted path.

    Raises:
        MLLMError: there is no such module.
    """
    try:
        module = model.get_submodule(path) if path else None
    except AttributeError:
        module = None
    if module is None:
        known = [name for name, _ in model.named_modules() if name]
        raise MLLMError(f"A stage's 'train' names {path!r}, which is not a part of the model. {near(path, known)}")
    return module
