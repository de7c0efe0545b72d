"""Estimate a stage's time as that of two sides: what prepares images, and what computes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mllm.planning.draft import Device

IMAGE_SECONDS = 5e-3  # of a processor core: 1.5 ms open a JPEG of 640 x 480, 3.2 ms resize it to 336 px (measured)


@dataclass(frozen=True)
class Time:
    """The seconds of a stage's sides: ``data`` opens and preprocesses images, ``encoder`` and ``rest`` compute.

    A GPU computes a step while the data of the next are made ready, so the longer side bounds the stage. On a CPU both
    sides need the same cores, one after the other.
    """

    data: float
    encoder: float
    rest: float

    @property
    def bound(self) -> Literal["data", "device"]:
        """Return the side that takes longer."""
        return "data" if self.data > self.encoder + self.rest else "device"

    def total(self, device: Device) -> float:
        """Return the seconds of the stage."""
        computing = self.encoder + self.rest
        return self.data + computing if device == "cpu" else max(self.data, computing)
