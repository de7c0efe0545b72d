"""Plan the feature cache: what it takes on disk and in memory, what it saves, and whether it pays."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from mllm.planning.draft import Draft
from mllm.planning.sizes import feature_bytes
from mllm.planning.workload import Workload
from mllm.system import cache_dir

WORTH = 0.1  # of a stage's FLOPs; a cache that saves less is not recommended
DISK = 1e9  # bytes a second that a disk is read with; every byte is verified as well, one core as fast


@dataclass(frozen=True)
class Cache:
    """The feature cache: its size, the share of FLOPs that it saves, and whether it is recommended."""

    bytes: int  # of all images' features
    disk: int  # of those that are kept, within the limit
    saves_later: float  # of an example's FLOPs, when its image is read again
    saves: float  # of the stage's FLOPs
    recommended: bool
    reason: str


def feature_size(draft: Draft, load: Workload) -> int:
    """Return the bytes of the features of all images of a stage, as they are stored."""
    rounded = draft.stage.cache.dtype == "bfloat16"
    return feature_bytes(draft.model.encoder, rounded=rounded) * draft.model.tiles_per_image * load.images


def kept_bytes(draft: Draft, load: Workload) -> int:
    """Return the bytes of the features that are on disk in the end."""
    whole, limit = feature_size(draft, load), draft.stage.feature_cache.bytes
    return whole if limit is None else min(whole, limit)


def encoded_images(draft: Draft, load: Workload) -> int:
    """Return how many images a stage encodes: those that are kept once, the others whenever they are read."""
    share = kept_bytes(draft, load) / max(1, feature_size(draft, load))
    return round(load.images * share + load.reads * (1 - share))


def plan_cache(draft: Draft, load: Workload, *, encoder: int, rest: int, rate: float | None, processes: int) -> Cache:
    """Return whether the feature cache is recommended, and why.

    Args:
        draft: of the stage.
        load: the images that it reads.
        encoder: FLOPs of one image.
        rest: FLOPs of all other parts in the stage.
        rate: FLOP/s of the encoder; None: not known.
        processes: that encode at the same time.
    """
    if draft.model.encoder is None:
        return Cache(0, 0, 0.0, 0.0, False, "there is no encoder")
    if draft.model.encoder_trains:
        return Cache(0, 0, 0.0, 0.0, False, "the encoder trains, so its features change")
    if draft.stage.train and draft.stage.data.augment is not None:
        return Cache(0, 0, 0.0, 0.0, False, "data.augment changes images in every step")
    whole, disk = feature_size(draft, load), kept_bytes(draft, load)
    storage = f"{whole / 1e9:,.1f} GB"
    if not draft.encoder_known:
        return Cache(
            whole, disk, 0.0, 0.0, False, f"only the shape of the encoder is known; the features take {storage}"
        )
    flops = encoder * load.reads + rest
    later = encoder * load.reads / max(1, flops)
    most = draft.stage.cache.bytes if draft.stage.cache.mode != "off" else None
    kept = 1.0 if most is None else min(1.0, most / max(1, whole))
    saves = kept * encoder * (load.reads - load.images) / max(1, flops)
    epochs = load.reads / max(1, load.images)
    again = f"an image that is read again takes {later:.0%} fewer FLOPs"
    if saves >= WORTH:
        reason = f"{again}; in {epochs:.1f} epochs it saves {saves:.0%} of the stage's, for {storage}"
    elif epochs < 1.05:
        reason = f"every image is read once in this stage ({again}; {storage})"
    else:
        reason = f"it saves {saves:.0%} of the stage's FLOPs in {epochs:.1f} epochs, for {storage} ({again})"
    if kept < 1:
        reason += (
            f"; only {kept:.1%} of the features fit into the limit of {(most or 0) / 2**30:,.3g} GiB (cache.limit)"
        )
    seconds = None if not rate or disk <= draft.stage.cache.memory else encoder / rate / processes
    obstacle = _obstacle(disk, whole // max(1, load.images), seconds)
    return Cache(whole, disk, later, saves, saves >= WORTH and not obstacle, reason + obstacle)


def _obstacle(disk: int, row: int, seconds: float | None) -> str:
    """Return why a cache that saves FLOPs does not pay, as the end of a sentence; empty if nothing is known against it.

    Args:
        disk: bytes of the features that are kept.
        row: bytes of an image's features.
        seconds: the time in which an image is encoded; None: it is not known, or the features fit into memory.
    """
    free = _free_bytes()
    if free is not None and disk > free:
        return f"; it does not fit: the disk of {cache_dir()} has {free / 1e9:,.1f} GB free"
    if seconds and row / seconds > DISK:
        return (
            f"; an image is encoded in {1e3 * seconds:.2g} ms, so that only a disk which reads "
            f"{row / seconds / 1e9:.1f} GB/s is faster"
        )
    return ""


def _free_bytes() -> int | None:
    """Return the free bytes of the disk of the cache folder; None: not known."""
    folder: Path = cache_dir().absolute()
    for parent in (folder, *folder.parents):
        if parent.is_dir():
            try:
                return shutil.disk_usage(parent).free
            except OSError:
                return None
    return None
