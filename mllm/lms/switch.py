"""What stands inside a language model and can be switched off: adapters, new tokens."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn


class Switched(nn.Module):
    """A module that computes nothing while it is off; it is on until it is told."""

    on = True

    @contextlib.contextmanager
    def off(self) -> Iterator[None]:
        """Compute without it."""
        self.on = False
        try:
            yield
        finally:
            self.on = True
