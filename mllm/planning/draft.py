"""A stage's model on paper, and what its computations take there: the code of training, on tensors without values."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mllm.build import fit_of, objectives_of
from mllm.config.parts import PARTS
from mllm.config.recipe import Recipe, Stage
from mllm.encoders.feature_store import FeatureStore
from mllm.hub import loading as hub
from mllm.planning.paper import on_paper
from mllm.planning.trace import Cost, Paper, cost
from mllm.planning.workload import Rows
from mllm.training.batches import rows_at_once
from mllm.training.setup import parameter_groups, precision, recompute, set_up

Device = Literal["cpu", "gpu"]
FEW = 4  # rows that are put on paper of a batch of many
BYTES_A_WEIGHT = {"8bit": 1.0, "4bit": 0.5 + 4 / 64}  # 4 bit: a float32 for each block of 64


@dataclass(frozen=True)
class PartSize:
    """Parameters of a part."""

    name: str
    parameters: int
    trained: int
    bytes: int


class Draft:
    """A stage's model on paper.

    Args:
        stage: what trains decides what is kept for backward.
        config: the stage's recipe.
        device: where it will be computed; on a CPU a batch passes in parts.
        before: of another stage: its model is used again where the parts are the same.
    """

    def __init__(self, stage: Stage, config: Recipe, device: Device, before: Draft | None = None) -> None:
        self.stage, self.device = stage, device
        self.model: Any
        self.paper: Paper
        if before is not None and all(getattr(stage, part) == getattr(before.stage, part) for part in PARTS):
            self.model, self.paper = before.model, before.paper
            self.model.spec = config.assembly(stage)
        else:
            self.model, self.paper = on_paper(stage, config), Paper()
            self.paper.put(self.model)
            if self.model.generates_text:
                self.model.lm.runner.separable = True  # a probe compares values, which are not here
        self.model.requires_grad_(False)
        self.trained: list[nn.Parameter] = []
        if stage.fit is None:
            self.trained = [p for group in parameter_groups(self.model, stage) for p in group["params"]]
            set_up(self.model, stage)

    def parts(self) -> list[PartSize]:
        """Return the sizes of the parts; adapters are not counted in what they are put into."""
        inside = {id(p) for p in self.model.adapters.parameters()}
        trained = {id(p) for p in self.trained}
        found = []
        for name in PARTS:
            part = getattr(self.model, name, None)
            own = [p for p in _parameters(part) if name == "adapters" or id(p) not in inside]
            if own:
                learnt = sum(p.numel() for p in own if id(p) in trained)
                found.append(PartSize(name, sum(p.numel() for p in own), learnt, self._bytes(name, own)))
        return found

    def step(self, rows: Rows) -> Cost:
        """Return what forward and backward of a batch take on one process, gradients included where they are new."""
        if not self.trained:
            return Cost()
        if rows.packed:
            return self._step(rows)
        objectives = objectives_of(self.stage.objectives)
        if self.device == "cpu" and rows.batch is not None and all(one.per_example for one in objectives):
            size = rows_at_once(len(rows.pieces), rows.positions, self.model.lm.model.dtype)
            part = self._step(rows.first(size))
            return Cost(part.peak, round(part.flops * len(rows.pieces) / size))
        if len(rows.pieces) <= 4 * FEW:
            return self._step(rows)
        one, two = self._step(rows.first(FEW)), self._step(rows.first(2 * FEW))  # of many rows, each takes the same
        more = len(rows.pieces) / FEW - 1
        return Cost(*(round(a + (b - a) * more) for a, b in zip(astuple(one), astuple(two), strict=True)))

    def _step(self, rows: Rows) -> Cost:
        objectives = objectives_of(self.stage.objectives)
        weights = torch.tensor([spec.weight for spec in self.stage.objectives])
        features = self._features(rows)
        for parameter in self.trained:
            parameter.grad = torch.empty_like(parameter) if self.stage.optim.accumulate > 1 else None
        self.model.train()
        if self.stage.optim.checkpointing:
            recompute(self.model)

        def forward_and_back() -> None:
            with self._autocast():
                losses = torch.stack(self.model(rows.pieces, features, rows.batch, objectives)).float()
            (losses * weights).sum().backward()

        return cost(forward_and_back)

    def connector(self, rows: Rows) -> Cost:
        """Return what the connector takes of a step."""
        connector, features = self.model.connector, self._features(rows)
        if connector is None or features is None or self.model.encoder_trains:
            return Cost()
        trains = any(parameter.requires_grad for parameter in connector.parameters())

        def forward_and_back() -> None:
            with torch.set_grad_enabled(trains):
                visual = connector(features)
            if trains:
                visual.sum().backward()

        return cost(forward_and_back)

    def validation(self, rows: Rows | None) -> Cost:
        """Return what a batch of the validation takes."""
        if rows is None or not self.trained or self.model.encoder_trains:
            return Cost()
        objectives = objectives_of(self.stage.objectives)
        self.model.eval()
        features = self._features(rows)
        with torch.no_grad():
            return cost(lambda: self.model(rows.pieces, features, rows.batch, objectives))

    def fit(self) -> Cost:
        """Return what the closed form takes."""
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
        return any(True for _ in _parameters(self.model.encoder))

    @cached_property
    def picture(self) -> Cost:
        """What one picture takes in the encoder."""
        return self.encode(1)

    def encode(self, pictures: int) -> Cost:
        """Return what pictures take in the frozen encoder, in chunks as the feature store makes them."""
        if not self.encoder_known or not pictures:
            return Cost()
        chunk = inspect.signature(FeatureStore).parameters["chunk"].default
        pixels = self.paper.empty(min(chunk, pictures), *self.model.encoder.shape)
        with torch.no_grad():
            return cost(lambda: self.model.encoder(pixels))

    def kv_bytes(self) -> int:
        """Return the bytes of key-value states of one prompt: its picture, the question, and the longest answer."""
        lm = self.model.lm
        if lm is None or self.model.connector is None:
            return 0
        text = 16 if lm.tokenizer is None else len(lm.tokenize(self.stage.prompt.question))
        length = self.model.tokens_per_image + text + int(self.stage.decoding.get("max_new_tokens", 20))
        self.model.eval()
        embeds = self.paper.empty(1, length, lm.dim, dtype=next(lm.parameters()).dtype)
        with torch.no_grad():
            states, _ = lm.prefill(embeds, torch.ones(1, length, dtype=torch.long))
        found = {id(t): t.numel() * t.element_size() for t in _tensors(states)}
        return sum(found.values())

    def feature_bytes(self) -> int:
        """Return the bytes of one picture's features."""
        encoder = self.model.encoder
        if encoder is None:
            return 0
        width = next((p.element_size() for p in encoder.parameters()), 4)
        return int(encoder.num_patches * encoder.dim * width)

    def loading(self) -> int:
        """Return the bytes that are there at once while weights are read: the files are mapped, then converted."""
        sizes = {part.name: part.bytes for part in self.parts()}
        files = {"encoder": _stored(self.stage.encoder, "encoders"), "lm": _stored(self.stage.lm, "lms")}
        converted = [size for name, size in files.items() if size > 1.5 * sizes.get(name, 0)]
        return sum(sizes.values()) + max(converted, default=0)

    def frozen_layers(self) -> list[int]:
        """Return the bytes of what is frozen in each layer of the language model: what FSDP divides."""
        lm = self.model.lm
        frozen = [
            [p for p in layer.parameters() if not p.requires_grad]
            for layer in (lm.layers if self.model.generates_text else [])
        ]
        return [sum(p.numel() * p.element_size() for p in layer) for layer in frozen]

    def _features(self, rows: Rows) -> Tensor | None:
        """Return features ``(I, P, D_vis)``, or pixels where the encoder trains."""
        encoder = self.model.encoder
        if encoder is None or not rows.images:
            return None
        if self.model.encoder_trains:
            return self.paper.empty(rows.images, *encoder.shape)
        dtype = next((p.dtype for p in encoder.parameters()), torch.float32)
        return self.paper.empty(rows.images, encoder.num_patches, encoder.dim, dtype=dtype)

    def _autocast(self) -> Any:
        word = precision(self.stage)
        if self.device == "gpu" and self.stage.optim.precision == "auto":
            word = "bf16"
        dtype = torch.float16 if word == "fp16" else torch.bfloat16
        return torch.autocast("cpu", dtype=dtype, enabled=word != "no")

    def _bytes(self, name: str, own: Sequence[nn.Parameter]) -> int:
        full = sum(p.numel() * p.element_size() for p in own)
        kind = self.stage.lm.quantize if name == "lm" and self.stage.lm else None
        if kind is None:
            return full
        model = self.model.lm.model
        head = model.get_output_embeddings()
        maps = [m.weight for m in model.modules() if isinstance(m, nn.Linear) and m is not head]
        kept = full - sum(p.numel() * p.element_size() for p in maps)
        return kept + round(sum(p.numel() for p in maps) * BYTES_A_WEIGHT[kind])


def _parameters(part: nn.Module | None) -> Iterator[nn.Parameter]:
    return iter(()) if part is None else part.parameters()


def _tensors(states: Any) -> list[Tensor]:
    """Return the tensors of key-value states, or of what stands for them."""
    holders = [states, *getattr(states, "layers", [])]
    return [value for holder in holders for value in vars(holder).values() if isinstance(value, Tensor)]


def _stored(spec: Any, group: str) -> int:
    """Return the bytes of a model's files, where they are in a folder on this machine and are read."""
    name = getattr(spec, "model", None)
    if name is None or spec.init == "random" or not (name.startswith("mllm/") or Path(name).is_dir()):
        return 0
    return sum(path.stat().st_size for path in Path(hub.resolve(name, group=group)).glob("*.safetensors"))
