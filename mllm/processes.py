"""Coordinate the processes of a run, as started by accelerate's launcher or torchrun."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, parse_flag_from_env
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, distributed
from torch.nn.functional import pad

from mllm.errors import MLLMError


def processes() -> PartialState:
    """Return accelerate's state: this process's rank, and the number of processes.

    accelerate uses several processes on CPUs only with ``cpu=True``, and the first call in a process decides.
    """
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))


def in_main_process(action: Callable[[], None]) -> None:
    """Do something in the main process, for which the others wait; what a user can correct is raised in all of them."""
    problem: MLLMError | None = None
    if processes().is_main_process:
        try:
            action()
        except MLLMError as error:
            problem = error
    (message,) = broadcast_object_list([None if problem is None else str(problem)])
    if message is not None:
        raise problem or MLLMError(message)


def gather_rows(local: Tensor) -> tuple[Tensor, int]:
    """Return the rows ``(N, ...)`` of all processes, of ``(n, ...)`` each, and the index of this process's first row.

    n may differ between processes. The gradient flows to every process's rows.
    """
    number = torch.tensor([len(local)], device=local.device)
    sizes = [torch.empty_like(number) for _ in range(distributed.get_world_size())]
    distributed.all_gather(sizes, number)
    counts = [int(size) for size in sizes]
    longest = max(counts)
    padded: Tensor = _Gather.apply(pad(local, [0, 0] * (local.dim() - 1) + [0, longest - len(local)]))  # type: ignore[no-untyped-call]
    rows = torch.cat([part[:count] for part, count in zip(padded.split(longest), counts, strict=True)])
    return rows, sum(counts[: distributed.get_rank()])


class _Gather(torch.autograd.Function):
    """All-gather with a gradient, for the same number of rows in every process."""

    @staticmethod
    def forward(ctx: Any, local: Tensor) -> Tensor:
        parts = [torch.empty_like(local) for _ in range(distributed.get_world_size())]
        distributed.all_gather(parts, local.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous()
        distributed.all_reduce(gradient)
        return gradient.chunk(distributed.get_world_size())[distributed.get_rank()]


def progress() -> Progress:
    """Return a progress bar with a note; of several processes only the main one shows it."""
    return Progress(
        TextColumn("{task.description:<12}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        disable=not processes().is_main_process,
    )
