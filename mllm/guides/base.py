"""Open a stage's guides when they are first asked for, and find them by name and kind.

A guide is a frozen model that a stage needs and the model that it trains does not: a scorer, another run, a language
model, an image decoder. It is no part of the model: it is neither trained nor saved. The recipe's ``scorer`` is the one
that answers are chosen by, so it is the only one that a saved model names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from mllm.capabilities import missing
from mllm.config.base import PartSpec
from mllm.config.parts import SCORER
from mllm.errors import MLLMError, near
from mllm.guides.contracts import Ask

if TYPE_CHECKING:  # named in signatures alone: the model stands above this page
    from mllm.model import Model

GROUPS = ("guides", "scorers", "lms", "image_decoders")  # of the registry, whose parts a guide may be
Opener = Callable[["Model | None", str, PartSpec | None], nn.Module]


class Guides:
    """The guides of a model in one stage.

    Args:
        specs: of each, by its name; the scorer's under ``scorer``.
        opener: builds one on a model's device, given the model, its name and its specification. Without a specification
            the scorer is the model itself; without a model, the guide is opened where torch makes tensors.
    """

    def __init__(self, specs: Mapping[str, PartSpec], opener: Opener) -> None:
        self._specs, self._opener = dict(specs), opener
        self.opened: dict[str, nn.Module] = {}

    def unopened(self) -> Guides:
        """Return the same guides for another model."""
        return Guides(self._specs, self._opener)

    def open(self, name: str, model: Model | None = None) -> Any:
        """Return the guide of a name, which is built when it is first asked for.

        Raises:
            MLLMError: no guide has that name, or it cannot be built.
        """
        if name not in self._specs and name != SCORER:
            raise MLLMError(f"No guide is called {name!r}. {near(name, self._specs)}")
        if name not in self.opened:
            self.opened[name] = self._opener(model, name, self._specs.get(name))
        return self.opened[name]

    def find(self, ask: Ask, model: Model | None = None) -> Any:
        """Return the guide of a name, or the only one of a kind.

        Raises:
            MLLMError: it is not of that kind, there is none, or there are several.
        """
        wanted = missing(*ask.kinds)
        if ask.name is not None:
            if ask.name not in self._specs:
                known = f" {near(ask.name, self._specs)}" if self._specs else ""
                raise MLLMError(f"No guide is called {ask.name!r}.{known} Expected {wanted}.")
            if not isinstance(guide := self.open(ask.name, model), ask.kinds):
                raise MLLMError(f"The guide {ask.name!r} is a {type(guide).__name__}: expected {wanted}.")
            return guide
        guides = {name: guide for name in self._specs if isinstance(guide := self.open(name, model), ask.kinds)}
        if len(guides) == 1:
            return next(iter(guides.values()))
        if not guides:
            raise MLLMError(f"A guide is missing: expected {wanted}.")
        raise MLLMError(f"Several guides will do: {', '.join(guides)}. Name one of them, guide: {min(guides)}.")

    def to(self, device: Any) -> None:
        """Move the opened guides to a device."""
        for guide in self.opened.values():
            guide.to(device)
