"""The processes that share a run, as accelerate's launcher or torchrun started them."""

from __future__ import annotations

from accelerate import PartialState
from accelerate.utils import parse_flag_from_env


def processes() -> PartialState:
    """Return this process's place among the others.

    accelerate looks for other processes on CPUs only where it is told to be on one, and the first look decides.
    """
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))
