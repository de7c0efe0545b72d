"""Measure what a stage's computations take: the code of training runs on tensors without values."""

from __future__ import annotations

from dataclasses import astuple
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mllm.config.parts import PARTS
from mllm.config.recipe import Stage
from mllm.encoders.feature_store import CHUNK
from mllm.fits.build import fit_of
from mllm.planning.paper import meta_model
from mllm.planning.sizes import cache_bytes, parameters_of
from mllm.planning.trace import Cost, Paper, cost
from mllm.planning.workload import Rows
from mllm.training.batches import rows_at_once
from mllm.training.guides import assembly_of, open_guides
from mllm.training.optimizers import optimizer_for
from mllm.training.setup import Objectives, parameter_groups, precision, recompute, set_up

Device = Literal["cpu", "gpu"]
FEW = 4  # rows that are computed of a batch of many


class Draft:
    """A stage's model, prepared as for training, without values.

    Args:
        stage: its trained parts decide what is kept for the backward pass.
        device: where it will be computed; a CPU computes a batch in parts.
        before: the draft of another stage, whose model is used again where the parts are the same.
    """

    def __init__(self, stage: Stage, device: Device, before: Draft | None = None) -> None:
        self.stage, self.device = stage, device
        self.model: Any
        self.paper: Paper
        if before is not None and all(getattr(stage, part) == getattr(before.stage, part) for part in PARTS):
            self.model, self.paper = before.model, before.paper
            self.model.spec = assembly_of(stage)
        else:
            self.model, self.paper = meta_model(stage), Paper()
            self.paper.put(self.model)
            if self.model.generates_text:
                self.model.lm.runner.separable = True  # a probe compares values, which are not here
        self.model.requires_grad_(False)
        with torch.device("meta"):
            open_guides(self.model, stage)
        for guide in self.model.guides.opened.values():
            self.paper.put(guide)
        self.objectives = Objectives(stage)
        self.trained: list[nn.Parameter] = []
        if stage.train:
            set_up(self.model, stage)
            optimizer = optimizer_for(stage.optim, parameter_groups(self.model, stage))
            self.trained = [p for group in optimizer.param_groups for p in group["params"]]

    def step(self, rows: Rows) -> Cost:
        """Return the cost of a batch's forward and backward pass on one process, new gradients included."""
        if not self.trained:
            return Cost()
        if rows.packed:
            return self._step(rows)
        if self.device == "cpu" and rows.batch is not None and not self.objectives.comparing:
            size = rows_at_once(len(rows.pieces), rows.length, self.model.lm.model.dtype)
            part = self._step(rows.first(size))
            return Cost(part.peak, round(part.flops * len(rows.pieces) / size))
        if len(rows.pieces) <= 4 * FEW:
            return self._step(rows)
        one, two = self._step(rows.first(FEW)), self._step(rows.first(2 * FEW))  # each of many rows takes the same
        more = len(rows.pieces) / FEW - 1
        return Cost(*(round(a + (b - a) * more) for a, b in zip(astuple(one), astuple(two), strict=True)))

    def _step(self, rows: Rows) -> Cost:
        weights = torch.tensor(self.objectives.weights)
        micro = (rows.pieces, self._features(rows), rows.batch)
        for parameter in self.trained:
            parameter.grad = torch.empty_like(parameter) if self.stage.optim.accumulate > 1 else None
        self.model.train()
        if self.stage.optim.checkpointing:
            recompute(self.model)

        def forward_and_back() -> None:
            with self._autocast():
                losses = self.objectives(self.model, micro)
            (losses * weights).sum().backward()

        return cost(forward_and_back)

    def connector(self, rows: Rows) -> Cost:
        """Return the connector's share of a step."""
        connector, features = self.model.connector, self._features(rows)
        if connector is None or features is None or self.model.encoder_trains:
            return Cost()
        trains = any(parameter.requires_grad for parameter in connector.parameters())

        def forward_and_back() -> None:
            with torch.set_grad_enabled(trains):
                visual = connector.before_words(features)  # a vocabulary after it is the language model's share
            if trains:
                visual.sum().backward()

        return cost(forward_and_back)

    def validation(self, rows: Rows | None) -> Cost:
        """Return the cost of a batch of the validation."""
        if rows is None or not self.trained or self.model.encoder_trains:
            return Cost()
        self.model.eval()
        micro = (rows.pieces, self._features(rows), rows.batch)
        with torch.no_grad():
            return cost(lambda: self.objectives(self.model, micro))

    def fit(self) -> Cost:
        """Return the cost of the closed form."""
        if self.stage.fit is None:
            return Cost()
        fit = fit_of(self.stage)

        def solve() -> None:
            with self.paper.mode:
                sums = fit.sums(self.model)
                sums.add(torch.empty(fit.chunk, sums.x_dim), torch.empty(fit.chunk, sums.y_dim))
                fit.solve(self.model, sums)

        return cost(solve)

    @cached_property
    def encoder_known(self) -> bool:
        """Whether there is an encoder of which more than the shape is known."""
        return any(True for _ in parameters_of(self.model.encoder))

    @cached_property
    def image(self) -> Cost:
        """The cost of encoding one image."""
        return self.encode(self.model.tiles_per_image)

    def encode(self, tiles: int) -> Cost:
        """Return the cost of encoding images' tiles with the frozen encoder, in chunks as the feature store does.

        The cells of an image are encoded together, and those of different images apart.
        """
        if not self.encoder_known or not tiles:
            return Cost()
        chunk = self.model.tiles_per_image if self.model.joint else CHUNK
        pixels = self.paper.empty(min(chunk, tiles), *self.model.encoder.shape)
        with torch.no_grad():
            one = cost(lambda: self.model.encoder(pixels))
        return one if tiles <= chunk else Cost(one.peak, one.flops * tiles // chunk)

    def kv_bytes(self) -> int:
        """Return the bytes of the KV cache of one prompt: an image, the question, and the longest answer."""
        lm = self.model.lm
        if lm is None or self.model.connector is None:
            return 0
        text = 16 if lm.tokenizer is None else len(lm.tokenize(self.stage.prompt.question))
        length = self.model.tokens_per_image + text + self.stage.longest_answer
        self.model.eval()
        embeds = self.paper.empty(1, length, lm.dim, dtype=next(lm.parameters()).dtype)
        with torch.no_grad():
            states, _ = lm.prefill(embeds, torch.ones(1, length, dtype=torch.long))
        return cache_bytes(states)

    def _features(self, rows: Rows) -> Tensor | None:
        """Return features ``(U, P, D_vis)``, or pixels where the encoder trains."""
        encoder = self.model.encoder
        if encoder is None or not rows.images:
            return None
        if self.model.encoder_trains:
            return self.paper.empty(self.model.tiles_of(rows.shown), *encoder.shape)
        dtype = next((p.dtype for p in encoder.parameters()), torch.float32)
        return self.paper.empty(self.model.tiles_of(rows.shown), encoder.num_patches, encoder.dim, dtype=dtype)

    def _autocast(self) -> Any:
        word = precision(self.stage)
        if self.device == "gpu" and self.stage.optim.precision == "auto":
            word = "bf16"
        dtype = torch.float16 if word == "fp16" else torch.bfloat16
        return torch.autocast("cpu", dtype=dtype, enabled=word != "no")
