"""Count the bytes of a stage's model: of its parts, their files, its layers and its features."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mllm.config.lm import LMSpec
from mllm.config.parts import PARTS, EncoderSpec
from mllm.config.recipe import Stage
from mllm.hub import loading as hub
from mllm.model import Model

BYTES_A_WEIGHT = {"8bit": 1.0, "4bit": 0.5 + 4 / 64}  # 4 bit: a float32 for each block of 64


@dataclass(frozen=True)
class PartSize:
    """Parameters of a part."""

    name: str
    parameters: int
    trained: int
    bytes: int


@dataclass(frozen=True)
class Idle:
    """Adapters that a stage holds though no stage has trained them yet, and what the stage takes without them.

    ``peak`` and ``flops`` are None where the model needs them.
    """

    types: str
    parameters: int
    peak: int | None = None
    flops: int | None = None


def part_sizes(model: Model, stage: Stage, trained: Sequence[nn.Parameter]) -> list[PartSize]:
    """Return the sizes of the parts; adapters are not counted in the part that they are inserted into."""
    inside = {id(p) for p in model.adapters.parameters()}
    training = {id(p) for p in trained}
    sizes = []
    for name in PARTS:
        part = getattr(model, name, None)
        mine = [p for p in parameters_of(part) if name == "adapters" or id(p) not in inside]
        if mine:
            number = sum(p.numel() for p in mine if id(p) in training)
            sizes.append(PartSize(name, sum(p.numel() for p in mine), number, _bytes(model, stage, name, mine)))
    return sizes + [_guide_size(name, guide) for name, guide in model.guides.opened.items()]


def _guide_size(name: str, guide: nn.Module) -> PartSize:
    weights = list(guide.parameters())
    size = sum(p.numel() * p.element_size() for p in weights)
    return PartSize(f"guides.{name}", sum(p.numel() for p in weights), 0, size)


def loading_bytes(stage: Stage, parts: Sequence[PartSize]) -> int:
    """Return the bytes in use at once while weights are loaded: the files are mapped, then converted."""
    sizes = {part.name: part.bytes for part in parts}
    files = {"encoder": _stored(stage.encoder, "encoders"), "lm": _stored(stage.lm, "lms")}
    converted = [size for name, size in files.items() if size > 1.5 * sizes.get(name, 0)]
    return sum(sizes.values()) + max(converted, default=0)


def frozen_layers(model: Model) -> list[int]:
    """Return the bytes of the frozen weights in each layer of the language model, which FSDP divides."""
    layers = model.lm.layers if model.generates_text else []
    frozen = [[p for p in layer.parameters() if not p.requires_grad] for layer in layers]
    return [sum(p.numel() * p.element_size() for p in weights) for weights in frozen]


def feature_bytes(encoder: Any, *, rounded: bool = False) -> int:
    """Return the bytes of the features of an image or a tile: as the encoder returns them, or rounded to 16 bits."""
    if encoder is None:
        return 0
    width = 2 if rounded else next((p.element_size() for p in encoder.parameters()), 4)
    return int(encoder.num_patches * encoder.dim * width)


def cache_bytes(states: Any) -> int:
    """Return the bytes of a KV cache, or of the states that stand for one."""
    holders = [states, *getattr(states, "layers", [])]
    tensors = [value for holder in holders for value in vars(holder).values() if isinstance(value, Tensor)]
    return sum({id(tensor): tensor.numel() * tensor.element_size() for tensor in tensors}.values())


def parameters_of(part: nn.Module | None) -> Iterator[nn.Parameter]:
    """Return the parameters of a part, none where there is no such part."""
    return iter(()) if part is None else part.parameters()


def _bytes(model: Model, stage: Stage, name: str, parameters: Sequence[nn.Parameter]) -> int:
    full = sum(p.numel() * p.element_size() for p in parameters)
    quantize = stage.lm.quantize if name == "lm" and stage.lm else None
    if quantize is None:
        return full
    head = model.lm.model.get_output_embeddings()
    maps = [m.weight for m in model.lm.model.modules() if isinstance(m, nn.Linear) and m is not head]
    kept = full - sum(p.numel() * p.element_size() for p in maps)
    return kept + round(sum(p.numel() for p in maps) * BYTES_A_WEIGHT[quantize.kind])


def _stored(spec: EncoderSpec | LMSpec | None, group: str) -> int:
    """Return the bytes of a model's files, where these are in a folder on this machine and are loaded."""
    name = None if spec is None or spec.init == "random" else spec.model
    if name is None or not (name.startswith("mllm/") or os.path.isdir(name)):
        return 0
    return sum(path.stat().st_size for path in Path(hub.resolve(name, group=group)).glob("*.safetensors"))
