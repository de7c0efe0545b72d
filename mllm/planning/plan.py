"""What a recipe will take, before anything is loaded: parameters, memory, FLOPs, the features' cache, time.

Notable: the stage's own code runs on tensors without values (`mllm.planning.trace`), so memory and FLOPs follow what
training does. What that cannot show (libraries, a heap's gaps) is added as it was
measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mllm.config import loading as recipes
from mllm.config.recipe import Recipe, Stage
from mllm.encoders.feature_store import LIMIT
from mllm.errors import MLLMError
from mllm.planning.draft import Device, Draft, PartSize
from mllm.planning.trace import Cost
from mllm.planning.workload import Workload, workload

Sharding = Literal["none", "fsdp"]
WORTH = 0.1  # of a stage's work; a cache that saves less is not recommended
LIBRARIES = {"cpu": 180 * 2**20, "gpu": 0}  # bytes that come with the first model: late imports, code, tokenizer
HEAP = {"cpu": 1.6, "gpu": 1.1}  # what an allocator grows to, over what lives at once; of GPUs not measured here


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
        images: pictures in the data; None: counted, or every example has one of its own.
        text: tokens of an example's text; None: counted, or 64.
    """

    device: Device = "cpu"
    processes: int = 1
    sharding: Sharding = "none"
    flops: float | None = None
    utilisation: float = 0.4
    encoder_flops: float | None = None
    images: int | None = None
    text: int | None = None


@dataclass(frozen=True)
class Memory:
    """Bytes of one process. ``peak`` is over what it held after its imports: ``phase`` needs most."""

    weights: int
    gradients: int
    optimizer: int
    activations: int  # of the step, or of what else the stage does with the model's weights
    features: int  # kept in memory
    loading: int  # while the weights are read
    peak: int
    phase: str


@dataclass(frozen=True)
class Flops:
    """Multiply-adds count two. ``encoder`` is of one picture, the others of one optimizer step of all processes."""

    encoder: int
    connector: int
    lm: int
    total: int  # of the stage, the features computed once if the cache keeps them


@dataclass(frozen=True)
class Cache:
    """The features' cache: what it weighs, what it saves, and whether it is worth it."""

    bytes: int
    saves_later: float  # of the work on a picture that comes up again
    saves: float  # of the stage's work
    recommended: bool
    reason: str


@dataclass(frozen=True)
class StagePlan:
    """What one stage takes."""

    name: str
    steps: int | None
    examples: int
    pictures: int
    rows: int  # of a batch on one process
    positions: int  # of its longest row
    tokens_per_image: int
    kv_bytes: int  # key-value states of one prompt with its answer
    parts: list[PartSize]
    memory: Memory
    flops: Flops
    cache: Cache
    seconds: float | None
    assumed: str = ""


@dataclass(frozen=True)
class Plan:
    """What a recipe takes, stage by stage."""

    recipe: str
    setting: Setting
    stages: list[StagePlan]


def plan(recipe: str, overrides: Mapping[str, Any] | Sequence[str] = (), setting: Setting | None = None) -> Plan:
    """Return what a recipe will take; nothing is loaded, and no network is needed.

    Raises:
        MLLMError: a recipe that is wrong; the first thing that does not fit.
    """
    config = recipes.load(recipe, overrides)
    if not config.stages:
        raise MLLMError(f"{config.name} has no stages: there is nothing to train.")
    setting = setting or Setting()
    stages, draft = [], None
    for stage in config.stages:
        draft = Draft(stage, config, setting.device, draft)
        stages.append(plan_stage(draft, config, setting))
    return Plan(config.name, setting, stages)


def plan_stage(draft: Draft, config: Recipe, setting: Setting) -> StagePlan:
    """Return what one stage takes."""
    stage = draft.stage
    if stage.fit is None and stage.batch_size < setting.processes:
        raise MLLMError(
            f"Stage {stage.name}: batch_size is {stage.batch_size}, and {setting.processes} processes need an example "
            "each. Set it higher."
        )
    load = workload(draft.model, stage, config, processes=setting.processes, images=setting.images, text=setting.text)
    step = draft.step(load.largest)
    typical = step.flops if load.typical is load.largest else draft.step(load.typical).flops
    flops = _flops(draft, load, typical, setting)
    cache = _cache(draft, load, flops)
    return StagePlan(
        name=stage.name,
        steps=stage.steps,
        examples=load.examples,
        pictures=load.pictures,
        rows=len(load.largest.pieces),
        positions=load.largest.positions,
        tokens_per_image=draft.model.tokens_per_image,
        kv_bytes=draft.kv_bytes(),
        parts=draft.parts(),
        memory=_memory(draft, load, step, cache, setting),
        flops=flops,
        cache=cache,
        seconds=_seconds(flops, stage, setting),
        assumed=load.assumed,
    )


def _memory(draft: Draft, load: Workload, step: Cost, cache: Cache, setting: Setting) -> Memory:
    """Return what one process holds, and the peak."""
    weights = sum(part.bytes for part in draft.parts())
    gradients = sum(p.numel() * p.element_size() for p in draft.trained)
    optimizer = 2 * gradients
    activations = step.peak if draft.stage.optim.accumulate > 1 else max(0, step.peak - gradients)
    if setting.processes > 1:
        gradients *= 2  # DDP's buckets
    if setting.sharding == "fsdp":
        layers = draft.frozen_layers()
        activations += 2 * max(layers, default=0)  # one at a time is put together, from what was gathered
        weights -= sum(layers) - -(-sum(layers) // setting.processes)
    kept = 0 if draft.stage.cache == "off" or draft.model.encoder_trains else cache.bytes
    features = min(kept, LIMIT) if draft.stage.cache == "auto" else kept
    encoding = 0 if draft.model.encoder_trains else draft.encode(load.largest.images).peak
    phases = {
        "a step": gradients + activations,
        "the encoder": encoding,
        "validation": draft.validation(load.validation).peak,
        "the fit": draft.fit().peak,
    }
    phase = max(phases, key=lambda name: phases[name])
    working = weights + optimizer + features + round(phases[phase] * HEAP[setting.device])
    loading = draft.loading()
    if loading > working:
        phase = "loading"
    peak = LIBRARIES[setting.device] + max(loading, working)
    return Memory(weights, gradients, optimizer, activations, features, loading, peak, phase)


def _flops(draft: Draft, load: Workload, step: int, setting: Setting) -> Flops:
    """Return the work, given the FLOPs of a step on one process."""
    stage, trains = draft.stage, draft.model.encoder_trains
    times = stage.optim.accumulate * setting.processes
    connector = draft.connector(load.typical).flops if draft.trained else 0
    encoder = draft.picture.flops
    pictures = 0 if trains else load.seen if stage.cache == "off" else load.pictures
    total = encoder * pictures + step * times * (stage.steps or 0)
    return Flops(encoder, connector * times, (step - connector) * times, total)


def _seconds(flops: Flops, stage: Stage, setting: Setting) -> float | None:
    if setting.flops is None:
        return None
    rate = setting.flops * setting.utilisation
    steps = (flops.connector + flops.lm) * (stage.steps or 0)
    return (steps / rate + (flops.total - steps) / (setting.encoder_flops or rate)) / setting.processes


def _cache(draft: Draft, load: Workload, flops: Flops) -> Cache:
    """Recommend the features' cache, or not, and say why."""
    if draft.model.encoder is None:
        return Cache(0, 0.0, 0.0, False, "there is no encoder")
    if draft.model.encoder_trains:
        return Cache(0, 0.0, 0.0, False, "the encoder trains, so its features change")
    size = draft.feature_bytes() * load.pictures
    weight = f"{size / 1e9:,.1f} GB"
    if not draft.encoder_known:
        return Cache(size, 0.0, 0.0, False, f"the encoder is known by its shape only; the features weigh {weight}")
    rest = (flops.connector + flops.lm) * (draft.stage.steps or 0)
    whole = flops.encoder * load.seen + rest
    later = flops.encoder * load.seen / max(1, whole)
    saves = flops.encoder * (load.seen - load.pictures) / max(1, whole)
    passes = load.seen / max(1, load.pictures)
    again = f"a picture that comes up again takes {later:.0%} less work"
    if saves >= WORTH:
        reason = f"{again}; in {passes:.1f} passes {saves:.0%} of the stage, for {weight}"
    elif passes < 1.05:
        reason = f"every picture comes up once in this stage ({again}; {weight})"
    else:
        reason = f"it saves {saves:.0%} of the stage in {passes:.1f} passes, for {weight} ({again})"
    return Cache(size, later, saves, saves >= WORTH, reason)
