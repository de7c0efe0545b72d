"""The processes that share a run, as accelerate's launcher or torchrun started them."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, distributed
from torch.nn.functional import pad


def processes() -> PartialState:
    """Return this process's place among the others.

    accelerate looks for other processes on CPUs only where it is told to be on one, and the first look decides.
    """
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))


def gathered(own: Tensor) -> tuple[Tensor, int]:
    """Return all processes' rows of ``own (n, D)``, n their own each, and where this one's start.

    A gradient of what comes back reaches every process' rows.
    """
    number = torch.tensor([len(own)], device=own.device)
    sizes = [torch.empty_like(number) for _ in range(distributed.get_world_size())]
    distributed.all_gather(sizes, number)
    counts = [int(size) for size in sizes]
    widest = max(counts)
    rows: Tensor = _Gather.apply(pad(own, (0, 0, 0, widest - len(own))))  # type: ignore[no-untyped-call]
    every = torch.cat([part[:count] for part, count in zip(rows.split(widest), counts, strict=True)])
    return every, sum(counts[: distributed.get_rank()])


class _Gather(torch.autograd.Function):
    """All processes' rows, of as many each."""

    @staticmethod
    def forward(ctx: Any, own: Tensor) -> Tensor:
        parts = [torch.empty_like(own) for _ in range(distributed.get_world_size())]
        distributed.all_gather(parts, own.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous()
        distributed.all_reduce(gradient)
        return gradient.chunk(distributed.get_world_size())[distributed.get_rank()]


def progress() -> Progress:
    """Return a bar: what, how far, how long still, and the latest figures; of several processes one shows it."""
    return Progress(
        TextColumn("{task.description:<12}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        disable=not processes().is_main_process,
    )
