"""Train one stage by gradient. It is the only training loop: objectives and parts vary, the loop does not.

Notable: an objective's loss in a step is its sum over all targets divided by their number, over accumulated batches and
processes alike, so how a batch is split changes nothing.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from rich.progress import Progress, TaskID

from mllm.config.recipe import Stage
from mllm.errors import MLLMError
from mllm.processes import progress
from mllm.training.batches import Batches, Drawn, parts
from mllm.training.kept import Checkpoints
from mllm.training.monitor import Monitor
from mllm.training.setup import Engine, Micro, Objectives, recompute
from mllm.training.signals import Signals
from mllm.training.throughput import Counts, Throughput
from mllm.training.validation import Validation


class Outcome(NamedTuple):
    """What a step came to, the same in all processes.

    Attributes:
        losses: each objective's mean loss.
        interrupted: whether a process has received a signal to stop.
        overdue: whether a checkpoint is due by the time.
        counts: what its batches held.
    """

    losses: list[float]
    interrupted: bool
    overdue: bool
    counts: Counts


@dataclass(frozen=True)
class Loop:
    """The training loop of one stage.

    Args:
        stage: how many steps, and how often a checkpoint is written.
        engine: the model, its optimizer and schedule, at the step to continue from.
        objectives: the weighted losses.
        batches: the training examples.
        validation: the held-out examples.
        monitor: the log.
        checkpoints: the training state, and where it is written.
        signals: that stop training after a step.
        throughput: measures the steps.
    """

    stage: Stage
    engine: Engine
    objectives: Objectives
    batches: Batches
    validation: Validation
    monitor: Monitor
    checkpoints: Checkpoints
    signals: Signals
    throughput: Throughput

    def __call__(self) -> None:
        """Train to the last step, or until the validation loss has not fallen for ``patience`` validations.

        Raises:
            Interrupted: a signal came; the checkpoint of the last step is written.
        """
        assert self.stage.steps is not None
        done, total = self.checkpoints.state.step, self.stage.steps
        started = time.monotonic()
        with self.signals.deferred(), progress() as bar, self.throughput:
            task = bar.add_task(self.stage.name, total=total, completed=done, note="")
            unread: list[tuple[int, torch.Tensor]] = []
            for step, batches in self.batches.steps(done, total):
                unread.append((step, self.step(batches)))
                if self._behind and len(unread) == 1 and not self._due(step):
                    continue  # the device computes, and the next step is begun before its losses are read
                interrupted = overdue = False
                while unread and (len(unread) > self._behind or interrupted or overdue or self._due(step)):
                    number, values = unread.pop(0)
                    outcome = self._outcome(values)
                    self._log(number, outcome, bar, task, started)
                    interrupted, overdue = interrupted or outcome.interrupted, overdue or outcome.overdue
                stop = self._validate(step, bar)
                if self.monitor.due(step):
                    self.monitor.evaluate(step, bar.console.print)
                if stop:
                    break
                if (interrupted or overdue or self.checkpoints.due(step)) and step < total:
                    self.checkpoints.write(step, self.engine.model, self.engine.optimizer, self.engine.schedule)
                    if interrupted:
                        where = f"after step {step} of {total} of stage {self.stage.name}; the checkpoint is written"
                        raise self.signals.interrupted(self.checkpoints.folder, where)
                self.throughput.start()
        self.validation.restore_best()
        self.engine.close()

    @property
    def _behind(self) -> int:
        """How many steps' losses may be unread: on a GPU one, so that it need not wait for the host."""
        return 1 if self.engine.accelerator.device.type == "cuda" else 0

    def _due(self, step: int) -> bool:
        """Whether a step is the last one, or something follows it for which all losses are read first."""
        last = step == self.stage.steps
        return last or self.validation.due(step) or self.monitor.due(step) or self.checkpoints.due(step)

    def step(self, batches: Sequence[Drawn]) -> torch.Tensor:
        """Do one optimizer step over accumulated batches, and return what `_outcome` reads, on the device."""
        engine = self.engine
        engine.model.train()
        if self.stage.optim.checkpointing:
            recompute(engine.model)
        micros = [
            part for drawn in batches for part in parts(engine.model, self.objectives, self.batches.readable(drawn))
        ]
        share = self._share(micros)
        totals = torch.zeros_like(share)
        for index, micro in enumerate(micros):
            last = index == len(micros) - 1
            synchronized = contextlib.nullcontext() if last else engine.accelerator.no_sync(engine.wrapped)
            with engine.layers(), synchronized:
                with engine.accelerator.autocast():
                    sums = self.objectives(engine.wrapped, micro)
                engine.accelerator.backward((sums * share * sums.new_tensor(self.objectives.weights)).sum())
                totals += sums.detach() * share
        counts = self.throughput.counted(micros, engine.update(), totals)
        # All processes stop, or write a checkpoint, after the same step.
        flags = totals.new_tensor([self.signals.received, self.checkpoints.overdue])
        reduced: torch.Tensor = engine.accelerator.reduce(torch.cat([totals, flags, counts]), "mean")
        return reduced

    def _outcome(self, reduced: torch.Tensor) -> Outcome:
        """Return what a step came to, which is the one wait for the device."""
        values = iter(reduced.tolist())
        losses = [next(values) for _ in self.objectives.losses]
        interrupted, overdue = next(values) > 0, next(values) > 0
        return Outcome(losses, interrupted, overdue, Counts.of(list(values), self.engine.accelerator.num_processes))

    def _share(self, micros: Sequence[Micro]) -> torch.Tensor:
        """Return the weight of each objective's sums ``(n,)``: one over its targets, as gradients are averaged."""
        accelerator = self.engine.accelerator
        counts = torch.tensor([self.objectives.count(micro) for micro in micros], device=accelerator.device)
        return accelerator.num_processes / accelerator.reduce(counts.sum(0)).clamp(min=1)

    def _log(self, step: int, outcome: Outcome, bar: Progress, task: TaskID, started: float) -> None:
        """Log the losses and show the progress.

        Raises:
            MLLMError: the loss is not finite.
        """
        losses, counts = outcome.losses, outcome.counts
        loss = sum(weight * value for weight, value in zip(self.objectives.weights, losses, strict=True))
        if not torch.isfinite(torch.tensor(loss)):
            raise MLLMError(f"The loss is {loss} at step {step} of {self.stage.name}. Lower the learning rate.")
        examples = (step - self.checkpoints.state.step) * self.stage.batch_size * self.stage.optim.accumulate
        speed = examples / (time.monotonic() - started)
        bar.update(task, advance=1, note=f"loss {loss:.3f}  {speed:.1f} examples/s")
        each = dict(zip(self.objectives.names, losses, strict=True))
        row = {"loss": loss, "lr": self.engine.rates[0], **(each if len(each) > 1 else {}), **counts.row}
        self.monitor.log(step, self.throughput.measured(counts), **row)

    def _validate(self, step: int, bar: Progress) -> bool:
        """Validate when it is due; return whether to stop."""
        if not self.validation.due(step):
            return False
        self.monitor.log(step, val_loss=self.validation())
        if self.validation.impatient:
            patience = self.stage.patience
            bar.console.print(f"{self.stage.name}: no lower validation loss for {patience} validations; stopped.")
        return self.validation.impatient
