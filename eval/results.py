"""Show the recipes' results, which `mllm recipes verify` wrote, as sentences and tables."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from mllm.config import loading as recipes
from mllm.planning.needs import planned_needs
from mllm.planning.paper import meta_model
from mllm.training.setup import parameter_groups

COLUMNS = ("blind", "shuffled", "nearest")  # baselines with a column in the table


def results(name: str, folder: str | Path | None = None) -> dict[str, Any] | None:
    """Return a recipe's results, from a folder or as they come with the package; None: it was not verified."""
    path = Path(folder or str(files("mllm.recipes") / "results")) / f"{name}.yaml"
    if not path.is_file():
        return None
    content = OmegaConf.to_container(OmegaConf.load(path))
    assert isinstance(content, dict)
    return {str(key): value for key, value in content.items()}


def summary(name: str) -> str:
    """Return a recipe's first result in a few words, or ``""``."""
    content = results(name)
    if content is None:
        return ""
    suite, score = next(iter(content["scores"].items()))
    return f"{suite} {score['value']:.3f} ({score['metric']}; shuffled {score['gains']['shuffled']['value']:.3f})"


def trained_weights(name: str) -> list[int]:
    """Return the number of trained weights of each stage that has gradients, counted on the meta device."""
    config = recipes.load(name)
    numbers = []
    with planned_needs(config):
        for stage in config.stages:
            if stage.train:
                groups = parameter_groups(meta_model(stage), stage)
                numbers.append(sum(parameter.numel() for group in groups for parameter in group["params"]))
    return numbers


def size(name: str) -> str:
    """Return a recipe's numbers of trained weights in words, from the package's own list; nothing is built."""
    sizes: Any = OmegaConf.load(str(files("mllm.recipes") / "results" / "sizes.yaml"))
    return ", then ".join(f"{weights:,}" for weights in sizes.get(name, [])) or "none by gradient"


def conditions(names: Sequence[str], folder: str | Path | None = None) -> str:
    """Return how results were measured, a line for each recipe that has any, and the baselines without a column."""
    return "".join(_condition(content) for name in names if (content := results(name, folder)))


def _condition(content: dict[str, Any]) -> str:
    lines = [
        f"- `{content['command']}`: seeds {', '.join(map(str, content['seeds']))}; "
        f"{max(content['items'].values())} items per suite; training takes up to "
        f"{content['minutes']} minutes per seed."
    ]
    for suite, score in content["scores"].items():
        lines += [
            f"    - {suite}, baseline `{name}`: {gain['value']:.3f}; gain {gain['low']:+.3f} to {gain['high']:+.3f}."
            for name, gain in score["gains"].items()
            if name not in COLUMNS
        ]
    return "\n".join(lines) + "\n"


def table(names: Sequence[str], folder: str | Path | None = None) -> str:
    """Return the recipes' results as a Markdown table."""
    lines = [
        f"| recipe | suite | metric | model | {' | '.join(COLUMNS)} | "
        + " | ".join(f"gain over {name}, 95 %" for name in COLUMNS)
        + " |",
        "|---|---|---|---" + "|---" * 2 * len(COLUMNS) + "|",
    ]
    for name in names:
        content = results(name, folder)
        for suite, score in (content["scores"] if content else {}).items():
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
