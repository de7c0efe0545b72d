"""One stage by gradient: the training loop, the only one there is. Objectives and parts vary, the loop does not.

Notable: an objective's loss in a step is its sum over all targets divided by their number, over accumulated batches and
processes alike, so how a batch is split changes nothing.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from transformers import get_scheduler

from mllm.build import objectives_of
from mllm.config.recipe import Recipe, Stage
from mllm.data.skipping import Skipped
from mllm.data.sources import fingerprint, read_all
from mllm.data.stream import Stream
from mllm.encoders.feature_store import FeatureStore
from mllm.errors import MLLMError
from mllm.model import Model
from mllm.processes import progress
from mllm.prompts.pieces import Piece, images_of
from mllm.training.batches import Micro, data, inputs, parts
from mllm.training.calibration import calibrate
from mllm.training.checkpoint import State, optimizer_tensors, random_states, set_optimizer
from mllm.training.monitor import answers, scores
from mllm.training.run import Run
from mllm.training.setup import accelerator_for, parameter_groups, recompute, schedule_name, set_up
from mllm.training.sharding import asked, divide, keep_apart
from mllm.training.validation import validate, validation_rows, without_prefix

CALIBRATION_EXAMPLES = 32


class Loop:
    """Trains one stage, from ``state.step`` on.

    Args:
        run: where it is logged.
        model: the assembly, put to where the stage starts or goes on.
        stage: what trains, on what, by which objectives.
        config: the whole recipe.
        store: of the encoder's features.
        state: where training stands.
    """

    def __init__(self, run: Run, model: Model, stage: Stage, config: Recipe, store: FeatureStore, state: State) -> None:
        assert stage.steps is not None
        self.run, self.model, self.stage, self.config, self.store, self.state = run, model, stage, config, store, state
        self.accelerator = accelerator_for(stage, run.path)
        if stage.batch_size < self.accelerator.num_processes:
            raise MLLMError(
                f"Stage {stage.name}: batch_size is {stage.batch_size}, and there are {self.accelerator.num_processes} "
                "processes, each of which needs an example."
            )
        groups = parameter_groups(model, stage)
        if asked() and self.accelerator.num_processes > 1 and model.generates_text:
            self._divide()
        model.to(self.accelerator.device)
        self.sources = data(stage, config.seed)
        total = sum(len(source.items) for source in self.sources)
        self.skipped = Skipped(stage.data.skip, total, partial(run.log, stage=stage.name))
        self.objectives = objectives_of(stage.objectives)
        self.weights = [spec.weight for spec in stage.objectives]
        self._check_packing()
        self._note_data()
        self.validation = validation_rows(stage, model)
        self.items = [item for source in read_all(stage.data.val) for item in source.items][: stage.eval.show]
        self._calibrate()
        set_up(model, stage)
        self.parameters = [parameter for group in groups for parameter in group["params"]]
        optimizer = torch.optim.AdamW(groups, weight_decay=stage.optim.weight_decay, betas=stage.optim.betas)
        keep_apart(model)
        self.wrapped, self.optimizer = self.accelerator.prepare(model, optimizer)
        self.schedule = get_scheduler(schedule_name(stage), self.optimizer, stage.optim.warmup, stage.steps)
        if state.step:
            set_optimizer(self.optimizer, state.tensors, state.rates)
            self.schedule.load_state_dict(state.schedule)

    def __call__(self) -> None:
        """Train to the last step, or until the validation loss has not fallen for ``patience`` validations."""
        stage, state, total = self.stage, self.state, self.stage.steps
        assert total is not None
        stream, started = self._stream(), time.monotonic()
        stream.skip(state.step * stage.optim.accumulate, stage.batch_size)  # nothing of what is done is opened
        upcoming = self._take(stream)
        with progress() as bar:
            task = bar.add_task(stage.name, total=total, completed=state.step, note="")
            for step in range(state.step + 1, total + 1):
                micro, upcoming = upcoming, self._take(stream) if step < total else []
                losses = self.step(micro)
                loss = sum(weight * value for weight, value in zip(self.weights, losses, strict=True))
                if not torch.isfinite(torch.tensor(loss)):
                    raise MLLMError(f"The loss is {loss} at step {step} of {stage.name}. Lower the learning rate.")
                examples_done = (step - state.step) * stage.batch_size * stage.optim.accumulate
                speed = examples_done / (time.monotonic() - started)
                bar.update(task, advance=1, note=f"loss {loss:.3f}  {speed:.1f} examples/s")
                self._log(step, loss, losses)
                stop = self._validated(step, bar)
                self._evaluated(step, bar)
                if stop:
                    break
                if step % stage.checkpoint_every == 0 and step < total:
                    self._checkpoint(step)
        self._finish()

    def step(self, micro: Sequence[Sequence[list[Piece]]]) -> list[float]:
        """Do one optimizer step over accumulated batches; return each objective's mean loss."""
        self.model.train()
        if self.stage.optim.checkpointing:
            recompute(self.model)
        prepared = [part for rows in micro for part in parts(self.model, self.objectives, self._readable(rows))]
        counts = [[float(o.count(rows, batch)) for o in self.objectives] for rows, _, batch in prepared]
        device = self.accelerator.device
        whole = self.accelerator.reduce(torch.tensor(counts, device=device).sum(0)).clamp(min=1)
        share = self.accelerator.num_processes / whole  # gradients are averaged over processes
        totals = torch.zeros(len(self.objectives), device=device)
        for index, (rows, features, batch) in enumerate(prepared):
            last = index == len(prepared) - 1
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.wrapped):
                with self.accelerator.autocast():
                    losses = torch.stack(self.wrapped(rows, features, batch, self.objectives)).float()
                self.accelerator.backward((losses * share * losses.new_tensor(self.weights)).sum())
                totals += losses.detach() * share
        if self.stage.optim.clip is not None:
            self.accelerator.clip_grad_norm_(self.parameters, self.stage.optim.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.model.tokens is not None and "tokens" in self.stage.train:
            self.model.tokens.rescale()
        self.schedule.step()
        return [float(value) for value in self.accelerator.reduce(totals, "mean")]

    def _take(self, stream: Stream) -> list[list[list[Piece]]]:
        """Return a step's batches; their pictures are opened from now on."""
        share = {"rank": self.accelerator.process_index, "world": self.accelerator.num_processes}
        micro = [stream.take(self.stage.batch_size, **share) for _ in range(self.stage.optim.accumulate)]
        if self.model.encoder is not None:
            self.store.expect([image for rows in micro for pieces in rows for image in images_of(pieces)])
        return micro

    def _stream(self) -> Stream:
        return Stream(
            self.sources,
            self.stage.prompt,
            seed=self.config.seed,
            lm=self.model.lm if self.model.generates_text else None,
            num_visual=self.model.tokens_per_image,
            data=self.stage.data,
        )

    def _readable(self, rows: Sequence[list[Piece]]) -> Micro:
        """Return a batch's inputs, without the examples that cannot be read or do not fit: looked for on failure.

        What is left weighs by its tokens, as ever; and a run that is resumed passes over the same examples.
        """

        def read(pieces: list[Piece]) -> None:
            if self.model.generates_text:
                self.model.encode(pieces)
            for image in images_of(pieces) if self.model.encoder is not None else []:
                self.model.encoder.open(image)

        try:
            return inputs(self.model, rows, self.store, pack=self.stage.data.pack)
        except MLLMError:
            return inputs(self.model, self.skipped.readable(rows, read), self.store, pack=self.stage.data.pack)

    def _divide(self) -> None:
        if self.stage.eval.every:
            raise MLLMError(
                "FSDP: processes that share the weights cannot answer each at its own pace. Set eval.every: null, and "
                "run mllm eval afterwards."
            )
        layers = divide(self.model.lm, self.accelerator.device)
        self.run.log(stage=self.stage.name, step=self.state.step, divided_layers=layers)

    def _check_packing(self) -> None:
        if self.stage.data.pack is None:
            return
        named = zip(self.stage.objectives, self.objectives, strict=True)
        together = [spec.type for spec, objective in named if not objective.per_example]
        if together:
            raise MLLMError(f"data.pack: the objective {together[0]!r} needs a row for each example. Leave it out.")
        if not self.model.lm.can_pack():
            raise MLLMError(
                "data.pack: in this language model examples that share a row touch each other, or no mask that keeps "
                "them apart is taken (tried with two short ones). Leave it out; group_by_length saves padding, too."
            )

    def _note_data(self) -> None:
        """Write down what tells the data from other data; a run is resumed on the same."""
        path, told = self.run.path / "data.json", fingerprint(self.sources)
        known = json.loads(path.read_text()) if path.is_file() else {}
        if self.state.step and known.get(self.stage.name, told) != told:
            raise MLLMError(
                f"The data of stage {self.stage.name} changed since {self.run.path} was started. Put it back, or go on "
                "with --accept-changes."
            )
        if self.accelerator.is_main_process:
            self.run.record(path.name, {**known, self.stage.name: told})

    def _calibrate(self) -> None:
        """Bring a new connector's output, if the stage trains it, to the scale of the language model's embeddings."""
        trains = any(path.split(".")[0] == "connector" for path in self.stage.train)
        if self.model.calibrated or not trains or not self.model.generates_text:
            return
        rows, _, _ = self._readable(self._stream().take(CALIBRATION_EXAMPLES))
        images = [image for pieces in rows for image in images_of(pieces)]
        if images:
            calibrate(self.model, self.store(images).to(self.model.device))
        self.model.calibrated = True

    def _log(self, step: int, loss: float, losses: Sequence[float]) -> None:
        each = {spec.type: value for spec, value in zip(self.stage.objectives, losses, strict=True)}
        row = {"loss": loss, "lr": self.optimizer.param_groups[0]["lr"], **(each if len(each) > 1 else {})}
        self.run.log(stage=self.stage.name, step=step, **row)
        self.accelerator.log({f"{self.stage.name}/{key}": value for key, value in row.items()}, step=step)

    def _validated(self, step: int, bar: Any) -> bool:
        """Validate when it is time; return whether to stop."""
        stage, every = self.stage, self.stage.validate_every
        if not self.validation or not (step == stage.steps or (every and step % every == 0)):
            return False
        loss = validate(self.model, self.validation, self.store, self.objectives, self.weights)
        self.run.log(stage=stage.name, step=step, val_loss=loss)
        self.accelerator.log({f"{stage.name}/val_loss": loss}, step=step)
        if self.state.best is None or loss < self.state.best:
            self.state.best, self.state.waited = loss, 0
            if stage.keep == "best":
                kept = {f"best.{name}": tensor.clone() for name, tensor in self.model.trained_state().items()}
                self.state.tensors = {**without_prefix(self.state.tensors, "best."), **kept}
        else:
            self.state.waited += 1
        if stage.patience is None or self.state.waited < stage.patience:
            return False
        bar.console.print(f"{stage.name}: no lower validation loss for {stage.patience} validations; stopped.")
        return True

    def _evaluated(self, step: int, bar: Any) -> None:
        """Run the recipe's suites, and answer the shown prompts, when it is time."""
        every = self.stage.eval.every
        if every is None or step % every:
            return
        self.model.eval()
        with torch.random.fork_rng(devices=[]):
            for item, answer in answers(self.model, self.items):
                bar.console.print(f"[dim]step {step}[/dim] {item.id}: {answer}")
                self.run.log(stage=self.stage.name, step=step, item=item.id, answer=answer)
            place = self.run.path / "eval" / f"{self.stage.name}-{step}"
            for name, value in scores(self.model, self.stage.eval, place).items():
                bar.console.print(f"[dim]step {step}[/dim] {name} {value:.3f}")
                self.run.log(stage=self.stage.name, step=step, suite=name, score=value)
                self.accelerator.log({name: value}, step=step)

    def _checkpoint(self, step: int) -> None:
        self.store.flush()  # first: features that are computed again, among others, may differ in the last bit
        trained = {f"model.{name}": tensor for name, tensor in self.model.trained_state().items()}
        best = {name: tensor for name, tensor in self.state.tensors.items() if name.startswith("best.")}
        tensors = {**trained, **best, **optimizer_tensors(self.optimizer), **random_states()}
        State(
            stage=self.state.stage,
            step=step,
            tensors=tensors,
            schedule=self.schedule.state_dict(),
            rates=[group["lr"] for group in self.optimizer.param_groups],
            frozen=self.state.frozen,
            best=self.state.best,
            waited=self.state.waited,
        ).write(self.run.path)

    def _finish(self) -> None:
        best = {k.removeprefix("best."): v for k, v in self.state.tensors.items() if k.startswith("best.")}
        if best:
            self.model.load_state_dict(best, strict=False)
        self.model.requires_grad_(False).eval()
        for tracker in self.accelerator.trackers:  # end_training would take the other processes away, too
            tracker.finish()
        self.accelerator.free_memory()
