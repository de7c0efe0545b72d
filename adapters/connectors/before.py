"""Change features before another connector: what connectors in front of others share."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from mllm.registry import lookup, made
from mllm.slots import Connector


class Before(Connector):
    """A connector that changes features and hands them to another; the other's last map and scale are its own.

    Attributes:
        num_tokens: Q, of the other connector.
        then: the other connector.
    """

    then: Any  # a Connector

    def hand_to(self, then: dict[str, Any] | None, **widths: Any) -> None:
        """Build the other connector.

        Args:
            then: its ``type`` and arguments; None: linear.
            widths: ``vis_dim``, ``lm_dim``, ``num_patches`` and ``grid`` of the changed features.
        """
        options = dict(then or {})
        kind = options.pop("type", "linear")
        self.then = made(lookup("connectors", kind), f"connector {kind}", **widths, **options)
        self.num_tokens, self.token_grid = self.then.num_tokens, self.then.token_grid

    def linear(self) -> nn.Linear | None:
        """Return the linear layer that ends the next connector; None: it has none."""
        linear: nn.Linear | None = self.then.linear()
        return linear

    def output(self) -> nn.Module | None:
        """Return the last module with weights of the next connector."""
        last: nn.Module | None = self.then.output()
        return last

    def changed(self, features: Tensor) -> Tensor:
        """Return the features that the next connector is given."""
        raise NotImplementedError

    def body(self, features: Tensor) -> Tensor:
        """Return the inputs of the next connector's linear layer."""
        inputs: Tensor = self.then.body(self.changed(features))
        return inputs

    def forward(self, features: Tensor) -> Tensor:
        """Return visual tokens ``(B, Q, D_lm)`` of features ``(B, P, D_vis)``."""
        tokens: Tensor = self.then(self.changed(features))
        return tokens
