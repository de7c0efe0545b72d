"""Start a stage's trackers (``track``): a run of the project that is called as the recipe, with it as configuration.

In W&B and trackio the run is called ``RUN/STAGE``, by the run's folder; TensorBoard, which calls runs by their folders,
reads ``RUN/tensorboard/STAGE/RECIPE``.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from mllm.config.loading import load
from mllm.config.recipe import Stage

Plain = str | int | float | bool


def start_trackers(accelerator: Accelerator, stage: Stage, run: Path) -> None:
    """Start the trackers that a stage names.

    Args:
        accelerator: was made with them.
        stage: with its ``steps``.
        run: the run's folder, which has its recipe.
    """
    if not stage.track:
        return
    recipe = load(str(run / "recipe.yaml"))
    here = {"stage": stage.name, "steps": stage.steps, "processes": accelerator.num_processes}
    config = flat({**recipe.model_dump(mode="json", by_alias=True), **here})
    name = f"{run.resolve().name}/{stage.name}"
    accelerator.project_configuration.logging_dir = os.fspath(run / "tensorboard" / stage.name)
    options = {"wandb": {"name": name, "group": run.resolve().name}, "trackio": {"name": name}}
    accelerator.init_trackers(recipe.name, config=config, init_kwargs=options)


def flat(value: Any, path: str = "") -> dict[str, Plain]:
    """Return a nested value as ``{"stages.0.optim.clip": 1.0, ...}``, with a text for null and for what is empty."""
    members = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    entries = {key: entry for name, member in members for key, entry in flat(member, f"{path}{name}.").items()}
    if entries or not path:
        return entries
    leaf = "null" if value is None else str(value) if isinstance(value, dict | list) else value
    return {path.removesuffix("."): leaf}
