"""The recipes' results: what `mllm recipes verify` wrote, as sentences and tables."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from mllm.config import loading as recipes
from mllm.planning.paper import on_paper
from mllm.training.setup import parameter_groups

COLUMNS = ("blind", "shuffled")  # baselines that have columns of the table


def results(name: str, folder: str | Path | None = None) -> dict[str, Any] | None:
    """Return what `verify` found for a recipe, from a folder or as it comes with the package; None: not verified."""
    path = Path(folder or str(files("mllm.recipes") / "results")) / f"{name}.yaml"
    if not path.is_file():
        return None
    found = OmegaConf.to_container(OmegaConf.load(path))
    assert isinstance(found, dict)
    return {str(key): value for key, value in found.items()}


def summary(name: str) -> str:
    """Return a recipe's first result in a few words, or nothing."""
    found = results(name)
    if found is None:
        return ""
    suite, score = next(iter(found["scores"].items()))
    return f"{suite} {score['value']:.3f} ({score['metric']}; shuffled {score['gains']['shuffled']['value']:.3f})"


def trained_weights(name: str) -> list[int]:
    """Return how many weights train in each stage that has gradients; counted on the meta device."""
    config = recipes.load(name, {"decoder": None})  # it trains nothing, and may be a run that is yet to come
    found = []
    for stage in config.stages:
        if stage.train:
            groups = parameter_groups(on_paper(stage), stage)
            found.append(sum(parameter.numel() for group in groups for parameter in group["params"]))
    return found


def size(name: str) -> str:
    """Return a recipe's trained weights in words, as they come with the package; nothing is built."""
    known: Any = OmegaConf.load(str(files("mllm.recipes") / "results" / "sizes.yaml"))
    return ", then ".join(f"{weights:,}" for weights in known.get(name, [])) or "none by gradient"


def conditions(names: Sequence[str], folder: str | Path | None = None) -> str:
    """Return how results were found, a line for each recipe that has some, and baselines that the table leaves out."""
    return "".join(_condition(found) for name in names if (found := results(name, folder)))


def _condition(found: dict[str, Any]) -> str:
    lines = [
        f"- `{found['command']}`: seeds {', '.join(map(str, found['seeds']))}; {max(found['items'].values())} items "
        f"per suite; training takes up to {found['minutes']} minutes per seed."
    ]
    for suite, score in found["scores"].items():
        lines += [
            f"    - {suite}, baseline `{name}`: {gain['value']:.3f}; gain {gain['low']:+.3f} to {gain['high']:+.3f}."
            for name, gain in score["gains"].items()
            if name not in COLUMNS
        ]
    return "\n".join(lines) + "\n"


def table(names: Sequence[str], folder: str | Path | None = None) -> str:
    """Return the recipes' results as a Markdown table."""
    lines = [
        "| recipe | suite | metric | model | blind | shuffled | gain over blind, 95 % | gain over shuffled, 95 % |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in names:
        found = results(name, folder)
        for suite, score in (found["scores"] if found else {}).items():
            gains = score["gains"]
            lines.append(
                f"| {name} | {suite} | {score['metric']} | {score['value']:.3f} | "
                + " | ".join(f"{gains[b]['value']:.3f}" if b in gains else "" for b in COLUMNS)
                + " | "
                + " | ".join(
                    f"{gains[b]['low']:+.3f} to {gains[b]['high']:+.3f}" if b in gains else "" for b in COLUMNS
                )
                + " |"
            )
    return "\n".join(lines) + "\n"
