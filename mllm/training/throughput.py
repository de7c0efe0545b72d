"""Measure what a step does: gradient norm, share of padding, tokens and images a second, FLOPs used, peak memory.

Notable: what is counted on the device is gathered together with the losses, so a step waits for the device no more
often than without it.
"""

from __future__ import annotations

import math
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mllm.config.recipe import Stage
from mllm.errors import first_line
from mllm.model import Model
from mllm.planning.flops import StepFlops, step_flops
from mllm.processes import processes
from mllm.prompts.pieces import images_of
from mllm.training.setup import Micro

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

PEAKS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H200 NVL": 835e12,
    "GH200": 989e12,
    "H100": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H800": 989e12,
    "H20": 148e12,
    "A100": 312e12,
    "A800": 312e12,
    "A40": 149.7e12,
    "A30": 165e12,
    "A10": 125e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
}


def peak_flops(device: str) -> float | None:
    """Return the dense bfloat16 FLOP/s of a GPU with accumulation in float32; None: it is not in the table.

    The figures are those of NVIDIA's data sheets, which give those of H100, H200, B200 and L4 with sparsity: half of
    that is dense. A part of a GPU (MIG) is not in the table.

    Args:
        device: the name as torch gives it, ``NVIDIA H100 80GB HBM3``.
    """
    words = set(device.replace("-", " ").split())
    known = [name for name in PEAKS if words >= set(name.split())]
    return None if "MIG" in words or not known else PEAKS[max(known, key=len)]


@dataclass(frozen=True)
class Counts:
    """What a step's batches of all processes hold, and the norm of its gradients.

    Attributes:
        tokens: of the examples; 0 without a language model.
        positions: tokens and padding.
        examples: rows of the batches.
        images: in the examples.
        encoded: tiles that the frozen encoder encoded since the step before, which were not cached.
        norm: of all gradients before they are clipped.
    """

    tokens: float
    positions: float
    examples: float
    images: float
    encoded: float
    norm: float

    @classmethod
    def of(cls, means: Sequence[float], number: int) -> Counts:
        """Return the counts of all processes, given the means of what ``number`` processes counted."""
        *sums, norm = means
        tokens, positions, examples, images, encoded = (number * mean for mean in sums)
        return cls(tokens, positions, examples, images, encoded, norm)

    @property
    def row(self) -> dict[str, float]:
        """Return what a repeated run has again: ``grad_norm``, and ``padding``, the share of the positions."""
        padding = {"padding": round(1 - self.tokens / self.positions, 6)} if self.positions else {}
        return {**({"grad_norm": self.norm} if math.isfinite(self.norm) else {}), **padding}


@dataclass
class Throughput:
    """Measure the steps of a stage; inside ``with`` the encoder's work is counted.

    Args:
        model: what trains.
        stage: how it is computed.
    """

    model: Model
    stage: Stage
    _encoded: int = 0
    _started: float = 0.0
    _traced: bool = False
    _peak: float | None = None
    _flops: StepFlops | None = None
    _hooks: list[Any] = field(default_factory=list)

    def __enter__(self) -> Throughput:
        if self.model.encoder is not None and not self.model.encoder_trains:
            self._hooks = [self.model.encoder.register_forward_hook(self._count)]
        if self.model.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.model.device)
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def start(self) -> None:
        """Begin a step: what happened since the last one (validation, a checkpoint) is no part of it."""
        self._started, self._encoded = time.monotonic(), 0

    def counted(self, micros: Sequence[Micro], norm: Tensor, like: Tensor) -> Tensor:
        """Return `Counts` of this process ``(6,)`` by its batches, on the device and of the type of ``like``."""
        batches = [batch for _, _, batch in micros if batch is not None]
        tokens = torch.stack([_tokens(batch.mask) for batch in batches]).sum() if batches else like.new_zeros(())
        images = sum(len(images_of(pieces)) for rows, _, _ in micros for pieces in rows)
        positions, examples = sum(batch.ids.numel() for batch in batches), sum(len(rows) for rows, _, _ in micros)
        on_host = like.new_tensor([positions, examples, images, self._encoded])
        self._trace(micros)
        return torch.cat([tokens.to(like).reshape(1), on_host, norm.to(like).reshape(1)])

    def measured(self, counts: Counts) -> dict[str, float]:
        """Return the figures of the step that ends now, of all processes; memory is this process's."""
        seconds = time.monotonic() - self._started
        row = {"seconds": seconds, "images_per_s": counts.images / seconds}
        if counts.positions:
            row["tokens_per_s"] = counts.tokens / seconds
        if self._flops is not None and self._peak is not None:
            flops = self._flops.each * (counts.tokens or counts.examples) + self._flops.tile * counts.encoded
            row["mfu"] = flops / seconds / (self._peak * processes().num_processes)
        return {**{key: float(f"{value:.5g}") for key, value in row.items()}, **_peak_memory(self.model.device)}

    def _count(self, _: Any, __: Any, features: Any) -> None:
        self._encoded += len(features)

    def _trace(self, micros: Sequence[Micro]) -> None:
        """Count the FLOPs of the stage's steps once, where the device's peak is known; the main process does."""
        if self._traced:
            return
        self._traced, began = True, time.monotonic()
        self._peak = _peak_of(self.model.device) if processes().is_main_process else None
        if self._peak is None:
            return
        rows, _, batch = micros[0]
        try:
            self._flops = step_flops(self.stage, list(rows), None if batch is None else batch.to(torch.device("cpu")))
        except Exception as error:  # of a part that cannot be traced: training does not depend on it
            reason = first_line(error)
            warnings.warn(f"The FLOPs of a step cannot be counted, so MFU is not logged: {reason}", stacklevel=2)
        self._started += time.monotonic() - began


def _peak_of(device: torch.device) -> float | None:
    return peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def _tokens(mask: Tensor) -> Tensor:
    """Return the number of tokens that are no padding, of a mask ``(B, T)`` or, of packed rows, ``(B, T, T)``."""
    if mask.dim() == 2:
        return mask.sum()
    alone = (mask.sum(1) == 1) & (mask.sum(2) == 1)  # padding attends to itself, and nothing else attends to it
    return (~alone).sum()


def _peak_memory(device: torch.device) -> dict[str, float]:
    """Return ``peak_gib``: a GPU's memory that was allocated at once in the stage; on a CPU that of the process."""
    if device.type == "cuda":
        size = torch.cuda.max_memory_allocated(device)
    elif resource is not None:
        unit = 1 if sys.platform == "darwin" else 1024
        size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    else:
        return {}
    return {"peak_gib": round(size / 2**30, 3)}
