"""Plan a recipe before anything is loaded: parameters, memory, FLOPs, the feature cache, time.

Notable: the code of the stage runs on tensors without values (`mllm.planning.trace`), so memory and FLOPs follow what
training does. What that cannot show (libraries, a fragmented heap) is added as it was measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from mllm.config import loading
from mllm.config.recipe import Stage
from mllm.errors import MLLMError
from mllm.planning.draft import Device, Draft
from mllm.planning.feature_cache import Cache, encoded_images, kept_bytes, plan_cache
from mllm.planning.needs import planned_needs
from mllm.planning.pipeline import IMAGE_SECONDS, Time
from mllm.planning.sizes import Idle, PartSize, frozen_layers, loading_bytes, part_sizes
from mllm.planning.trace import Cost
from mllm.planning.workload import Text, Workload, workload

Sharding = Literal["none", "fsdp"]
LIBRARIES = {"cpu": 180 * 2**20, "gpu": 0}  # bytes that come with the first model: late imports, code, tokenizer
HEAP = {"cpu": 1.6, "gpu": 1.1}  # size of an allocator's heap over the bytes alive in it; not measured on GPUs


@dataclass(frozen=True)
class Setting:
    """Where the recipe is to run.

    Args:
        device: of a process.
        processes: one for each device.
        sharding: what is divided among them: nothing (DDP), or the language model's frozen layers (``fsdp``).
        flops: FLOP/s that one device can do; None: time is not known.
        utilisation: the share of them that training reaches.
        encoder_flops: FLOP/s that the encoder reaches, where that was measured.
        images: images in the data; None: counted, or every example has another one.
        text: tokens of an example's text; None: counted, or 64.
        workers: of one process, which open and preprocess images, each on a processor core.
        image_seconds: that a core takes for an image.
    """

    device: Device = "cpu"
    processes: int = 1
    sharding: Sharding = "none"
    flops: float | None = None
    utilisation: float = 0.4
    encoder_flops: float | None = None
    images: int | None = None
    text: int | None = None
    workers: int = 8
    image_seconds: float = IMAGE_SECONDS


@dataclass(frozen=True)
class Memory:
    """Bytes of one process. ``peak`` is over those it held after its imports, and is reached in ``phase``."""

    weights: int
    gradients: int
    optimizer: int
    activations: int  # of a step
    features: int  # cached in the host's memory
    loading: int  # while the weights are read
    peak: int
    phase: str


@dataclass(frozen=True)
class Flops:
    """A multiply-add counts as two. ``encoder`` is of one image, the others of one optimizer step of all processes."""

    encoder: int
    connector: int
    lm: int
    total: int  # of the stage, where cached features are computed once


@dataclass(frozen=True)
class StagePlan:
    """The plan of one stage."""

    name: str
    steps: int | None
    examples: int
    images: int
    rows: int  # of a batch on one process
    length: int  # of its longest row, in tokens
    tokens_per_image: int  # the most of any image
    kv_bytes: int  # of the KV cache of one prompt with its answer
    parts: list[PartSize]
    memory: Memory
    flops: Flops
    cache: Cache
    seconds: float | None
    time: Time | None
    bound: Literal["data", "device"] | None  # the side that takes longer
    text: Text | None  # of the examples that were read
    assumed: str = ""
    idle: Idle | None = None


@dataclass(frozen=True)
class Plan:
    """The plan of a recipe, stage by stage."""

    recipe: str
    setting: Setting
    stages: list[StagePlan]
    needs: list[str] = field(default_factory=list)  # on runs that are trained first, and are not part of the plan


def plan(recipe: str, overrides: Mapping[str, Any] | Sequence[str] = (), setting: Setting | None = None) -> Plan:
    """Return the plan of a recipe; nothing is loaded, and no network is needed.

    Runs that the recipe needs and that are not there yet are named, and their own training is not part of it.

    Raises:
        MLLMError: the recipe is wrong; the message names the first thing that does not fit.
    """
    config = loading.load(recipe, overrides)
    if not config.stages:
        raise MLLMError(f"{config.name} has no stages: there is nothing to train.")
    setting = setting or Setting()
    stages, draft, adapted = [], None, False
    with planned_needs(config) as needs:
        for stage in config.stages:
            draft = Draft(stage, setting.device, draft)
            planned, adapted = plan_stage(draft, setting), adapted or stage.sets("adapters")
            stages.append(planned if adapted else replace(planned, idle=_idle(stage, planned, setting)))
    return Plan(config.name, setting, stages, [need.note for need in needs])


def plan_stage(draft: Draft, setting: Setting) -> StagePlan:
    """Return the plan of one stage."""
    stage = draft.stage
    if stage.fit is None and stage.batch_size < setting.processes:
        raise MLLMError(
            f"Stage {stage.name}: batch_size is {stage.batch_size}, and {setting.processes} processes need an example "
            "each. Set batch_size higher."
        )
    load = workload(draft.model, stage, processes=setting.processes, images=setting.images, text=setting.text)
    step = draft.step(load.largest)
    typical = step.flops if load.typical is load.largest else draft.step(load.typical).flops
    flops = _flops(draft, load, typical, setting)
    cache = plan_cache(
        draft,
        load,
        encoder=flops.encoder,
        rest=(flops.connector + flops.lm) * (load.steps or 0),
        rate=_encoder_rate(setting),
        processes=setting.processes,
    )
    time = _time(flops, draft, load, setting)
    return StagePlan(
        name=stage.name,
        steps=load.steps,
        examples=load.examples,
        images=load.images,
        rows=len(load.largest.pieces),
        length=load.largest.length,
        tokens_per_image=draft.model.tokens_per_image,
        kv_bytes=draft.kv_bytes(),
        parts=part_sizes(draft.model, stage, draft.trained),
        memory=_memory(draft, load, step, setting),
        flops=flops,
        cache=cache,
        seconds=None if time is None else time.total(setting.device),
        time=time,
        bound=None if time is None else time.bound,
        text=load.text,
        assumed=load.assumed,
    )


def _idle(stage: Stage, planned: StagePlan, setting: Setting) -> Idle | None:
    """Return a stage's adapters, which have been trained by none so far, and its plan's figures without them."""
    if not stage.adapters:
        return None
    types = ", ".join(spec.type for spec in stage.adapters)
    number = sum(part.parameters for part in planned.parts if part.name == "adapters")
    try:
        without = plan_stage(Draft(stage.model_copy(update={"adapters": []}), setting.device), setting)
    except MLLMError:
        return Idle(types, number)
    return Idle(types, number, without.memory.peak, without.flops.total)


def _memory(draft: Draft, load: Workload, step: Cost, setting: Setting) -> Memory:
    """Return the memory of one process."""
    parts = part_sizes(draft.model, draft.stage, draft.trained)
    weights = sum(part.bytes for part in parts)
    gradients = sum(p.numel() * p.element_size() for p in draft.trained)
    few_bits = "8bit" in draft.stage.optim.name  # a byte for each of two states
    optimizer = 2 * (sum(p.numel() for p in draft.trained) if few_bits else gradients)
    activations = step.peak if draft.stage.optim.accumulate > 1 else max(0, step.peak - gradients)
    if setting.processes > 1:
        gradients *= 2  # DDP's buckets
    if setting.sharding == "fsdp":
        layers = frozen_layers(draft.model)
        activations += 2 * max(layers, default=0)  # whole: the layer that computes, and the one that is prefetched
        weights -= sum(layers) - -(-sum(layers) // setting.processes)
    features = 0 if draft.model.encoder is None else min(kept_bytes(draft, load), draft.stage.cache.memory)
    encoding = 0 if draft.model.encoder_trains else draft.encode(draft.model.tiles_of(load.largest.shown)).peak
    phases = {
        "a step": gradients + activations,
        "the encoder": encoding,
        "validation": draft.validation(load.validation).peak,
        "the fit": draft.fit().peak,
    }
    phase = max(phases, key=lambda name: phases[name])
    hosted = features if setting.device == "cpu" else 0  # a GPU has the features of its batch alone
    working = weights + optimizer + hosted + round(phases[phase] * HEAP[setting.device])
    loading = loading_bytes(draft.stage, parts)
    if loading > working:
        phase = "loading"
    peak = LIBRARIES[setting.device] + max(loading, working)
    return Memory(weights, gradients, optimizer, activations, features, loading, peak, phase)


def _flops(draft: Draft, load: Workload, step: int, setting: Setting) -> Flops:
    """Return the FLOPs, given those of a step on one process."""
    stage, trains = draft.stage, draft.model.encoder_trains
    times = stage.optim.accumulate * setting.processes
    connector = draft.connector(load.typical).flops if draft.trained else 0
    encoder = draft.image.flops
    images = 0 if trains else _opened(draft, load)
    total = encoder * images + step * times * (load.steps or 0)
    return Flops(encoder, connector * times, (step - connector) * times, total)


def _opened(draft: Draft, load: Workload) -> int:
    """Return how many images are opened and encoded in a stage: those with kept features once."""
    return 0 if draft.model.encoder is None else encoded_images(draft, load)


def _time(flops: Flops, draft: Draft, load: Workload, setting: Setting) -> Time | None:
    if setting.flops is None:
        return None
    rate, encoder_rate = setting.flops * setting.utilisation, _encoder_rate(setting)
    steps = (flops.connector + flops.lm) * (load.steps or 0)
    data = _opened(draft, load) * setting.image_seconds / (setting.workers * setting.processes)
    encoder, rest = (flops.total - steps) / (encoder_rate or rate), steps / rate
    return Time(data, encoder / setting.processes, rest / setting.processes)


def _encoder_rate(setting: Setting) -> float | None:
    """Return the FLOP/s that the encoder reaches; None: not known."""
    return setting.encoder_flops or (None if setting.flops is None else setting.flops * setting.utilisation)
