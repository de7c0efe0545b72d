"""Test every combination of encoder, language model and connector at tiny size, and list the failures.

Parts are built once, and only connectors change between them. Each triple's result is a line of JSON on disk before the
next one begins, so a run that was stopped continues.
"""

from __future__ import annotations

import itertools
import json
import os
import tempfile
import textwrap
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mllm.assembly import Assembly
from mllm.build import build_encoder, build_lm, join
from mllm.config.messages import checked
from mllm.config.parts import AssemblySpec
from mllm.errors import MLLMError
from mllm.prompts.batch import collate
from mllm.prompts.pieces import Target, images_of
from mllm.registry import table
from mllm.saving import restore
from mllm.system import write
from mllm.testing import ENCODER_FAMILIES, LM_FAMILIES, tiny_image
from mllm.training.run import environment

# Small sizes; other connectors are built with their defaults.
OPTIONS: dict[str, dict[str, Any]] = {
    "mapper": {"tokens": 5, "dim": 16, "layers": 2, "heads": 2, "ffn": 32},
    "resampler": {"tokens": 4, "depth": 2, "heads": 2},
    "qformer": {"tokens": 6, "dim": 16, "layers": 2, "heads": 2},
    "temporal": {"frames": 1, "dim": 16, "heads": 2},
    "token-merge": {"merge": 1, "layers": 2, "dim": 16, "heads": 2},
}
FIRST, SECOND, THIRD = (tiny_image(seed) for seed in range(3))
PROMPTS: list[list[Any]] = [
    [FIRST, "A cat, and ", SECOND, "what is this?"],
    ["Short", THIRD],
    ["No image in this one"],
]
FILE, PAGE = "matrix.jsonl", "matrix.md"


class Triple(NamedTuple):
    """One line: a combination, and why it fails ("": it works)."""

    encoder: str
    lm: str
    connector: str
    why: str
    seconds: float


class Parts:
    """The tiny parts, built once each in a folder."""

    def __init__(
        self, folder: Path, encoders: dict[str, Callable[[Path], str]], lms: dict[str, Callable[[Path], str]]
    ) -> None:
        self.folder, self.encoders, self.lms = folder, encoders, lms
        self.encoder, self.lm = cache(self._encoder), cache(self._lm)

    def spec(self, encoder: str, lm: str, connector: str) -> AssemblySpec:
        """Return the specification of a triple."""
        values = {
            "encoder": {"model": self._made(self.encoders, "encoder", encoder)},
            "lm": {"model": self._made(self.lms, "lm", lm), "dtype": "float32"},
            "connector": {"type": connector, **OPTIONS.get(connector, {})},
        }
        return checked(AssemblySpec, values)

    def _made(self, families: dict[str, Callable[[Path], str]], kind: str, name: str) -> str:
        folder = self.folder / kind / name
        return str(folder) if folder.exists() else families[name](folder)

    def _encoder(self, name: str) -> Any:
        return build_encoder(self.spec(name, next(iter(self.lms)), "linear"))

    def _lm(self, name: str) -> Any:
        return build_lm(self.spec(next(iter(self.encoders)), name, "linear"))


def run(*, out: Path | None = None, repeats: int = 1, progress: Callable[[str], None] = print) -> list[Triple]:
    """Test every triple that ``out`` does not have yet, and write the table there.

    Args:
        out: the folder of `matrix.jsonl` and `matrix.md`; None: nothing is written.
        repeats: not used: each triple is tested once.
        progress: called with a line for each pair of encoder and language model.
    """
    names = [*itertools.product(ENCODER_FAMILIES, LM_FAMILIES, sorted(table("connectors")))]
    with tempfile.TemporaryDirectory() as folder:
        parts = Parts(Path(folder), ENCODER_FAMILIES, LM_FAMILIES)
        if out is None:
            return [tried(parts, *name) for name in names]
        out.mkdir(parents=True, exist_ok=True)
        done = read(out / FILE)
        for pair, group in itertools.groupby(names, lambda name: name[:2]):
            left = [name for name in group if name not in done]
            for name in left:
                done[name] = add(out / FILE, tried(parts, *name))
            if left:
                failures = sum(bool(done[name].why) for name in left)
                progress(f"{len(done)} of {len(names)}: {' + '.join(pair)}, {failures or 'none'} of {len(left)} fail")
    triples = [done[name] for name in names]
    write(out / PAGE, lambda file: file.write_text(page(triples), encoding="utf-8"))
    return triples


def tried(parts: Parts, encoder: str, lm: str, connector: str) -> Triple:
    """Return the result of one triple."""
    started, why = time.perf_counter(), ""
    try:
        check(parts, parts.spec(encoder, lm, connector), parts.encoder(encoder), parts.lm(lm))
    except Exception as error:  # any error is the reason for the failure
        why = " ".join((str(error) or type(error).__name__).split())[:300]
    return Triple(encoder, lm, connector, why, round(time.perf_counter() - started, 3))


def check(parts: Parts, spec: AssemblySpec, encoder: Any, lm: Any) -> None:
    """Train a step, compare a batch with its members, generate, save and load.

    Raises:
        AssertionError: a check failed. Any other error comes from the parts.
    """
    model = join(spec, encoder=encoder, lm=lm)
    _trains(model)
    with torch.no_grad():
        logits = _batch_is_its_members(model)
        again = join(spec, encoder=encoder, lm=lm)
        saved = model.save(parts.folder / "saved")  # overwrites the last triple's
        restore(again, saved)  # into the same parts, which are not built again
        assert torch.equal(_next(again, PROMPTS), logits), "the saved and loaded model gives different logits"


def _trains(model: Assembly) -> None:
    """Check that a step of gradient descent reaches the connector, and nothing else."""
    model.requires_grad_(False)
    model.connector.requires_grad_(True)
    batch = collate([model.encode([*prompt, Target(" yes")]) for prompt in PROMPTS], model.lm.pad)
    images = [image for prompt in PROMPTS for image in images_of(prompt)]
    embeds = model.embed(model.connector(model.features(images)), batch)
    loss = model.lm.losses(embeds, batch.mask, batch.labels).sum()
    loss.backward()
    reached = {name.split(".")[0] for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert reached == {"connector"}, f"gradients reach {sorted(reached)}"
    for parameter in model.connector.parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), "a gradient is missing or not finite"
        parameter.data -= 1e-3 * parameter.grad / (parameter.grad.norm() + 1e-6)
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in model.connector.parameters()), "gradients are 0"
    model.connector.zero_grad()


def _batch_is_its_members(model: Assembly) -> torch.Tensor:
    """Return the next token's logits, and check that a padded batch gives each prompt the logits that it gets alone."""
    together = _next(model, PROMPTS)
    assert together.isfinite().all(), "logits are not finite"
    difference = _difference(model, together)
    if difference > 1e-4:
        exact = _difference(model.double(), _next(model, PROMPTS))
        model.float()
        raise AssertionError(
            f"a batch gives different logits, by {difference:.2g} of the largest; in float64 by {exact:.2g}"
        )
    answers = model.generate(PROMPTS, max_new_tokens=3)
    alone = model.generate(PROMPTS[1:2], max_new_tokens=3)
    assert str(answers[1]) == str(alone[0]), "a batch gives a different answer"
    return together


def _difference(model: Assembly, together: torch.Tensor) -> float:
    """Return the relative difference of a batch's logits from those of its members alone."""
    alone = torch.cat([_next(model, [prompt]) for prompt in PROMPTS])
    return float(((together - alone).abs().amax(1) / together.abs().amax(1)).max())


def _next(model: Assembly, prompts: Sequence[Sequence[Any]]) -> torch.Tensor:
    embeds, batch = model.prepare(prompts)
    logits: torch.Tensor = model.lm.prefill(embeds, batch.mask)[1]
    return logits


def read(path: Path) -> dict[tuple[str, str, str], Triple]:
    """Return the triples of a file, which is created if it is missing; an incomplete last line is removed.

    Raises:
        MLLMError: the file was made with other versions.
    """
    if not path.exists():
        path.write_text(json.dumps(_versions()) + "\n")
    text = path.read_text(encoding="utf-8")
    complete = text[: text.rfind("\n") + 1]
    if complete != text:
        write(path, lambda file: file.write_text(complete, encoding="utf-8"))
    first, *lines = complete.splitlines()
    if json.loads(first) != _versions():
        raise MLLMError(f"{path} was begun with {first}, and this is {json.dumps(_versions())}. Give another --out.")
    triples = [Triple(*json.loads(line)) for line in lines]
    return {triple[:3]: triple for triple in triples}


def add(path: Path, triple: Triple) -> Triple:
    """Append a line, and return when it is on disk."""
    with path.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(triple) + "\n")
        stream.flush()
        os.fsync(stream.fileno())
    return triple


def _versions() -> dict[str, str]:
    versions = environment()
    return {name: versions[name] for name in ("torch", "transformers")}


PAGE_TEXT = """\
# Compatibility

{encoders} encoder families, {lms} language model families and {connectors} connectors, tested with tiny random weights:
{works:,} of {all:,} combinations work. A combination works if

- a training step gives gradients to the connector, and to nothing else;
- in a left-padded batch of prompts (with two images, one, and none) each prompt gets the logits that it gets alone, to
  1e-4 of the largest logit in float32, and the same greedy answer;
- the saved and reloaded model gives equal logits.

`mllm bench matrix` tests all combinations in {minutes:.0f} minutes on one core and writes this page
({versions}). An interrupted run continues where it stopped. Other families are assembled
in the same way: no family is known by name.

A number in the table is how many of the {connectors} connectors work:
{connector_names}. The columns are the encoders:

{encoder_names}

```text
{table}
```

## What does not work

{reasons}
"""


def page(triples: Sequence[Triple]) -> str:
    """Return the page with the table, as Markdown."""
    encoders, lms, connectors = (list(dict.fromkeys(column)) for column in list(zip(*triples, strict=True))[:3])
    good = Counter((triple.encoder, triple.lm) for triple in triples if not triple.why)
    head = f"{'':<12}" + "".join(f"{index:>3}" for index, _ in enumerate(encoders, 1))
    rows = [f"{lm:<12}" + "".join(f"{good[encoder, lm]:>3}" for encoder in encoders) for lm in lms]
    return PAGE_TEXT.format(
        encoders=len(encoders),
        lms=len(lms),
        connectors=len(connectors),
        all=len(triples),
        works=good.total(),
        minutes=sum(triple.seconds for triple in triples) / 60,
        versions=", ".join(f"{name} {value}" for name, value in _versions().items()),
        connector_names=", ".join(f"`{name}`" for name in connectors),
        encoder_names=textwrap.fill(", ".join(f"{index} {name}" for index, name in enumerate(encoders, 1)) + ".", 118),
        table="\n".join([head, *rows]),
        reasons="\n".join(_reasons(triples)) or "Nothing: all combinations work.",
    )


def _reasons(triples: Iterable[Triple]) -> list[str]:
    """Return each reason for a failure once, with its parts."""
    groups: dict[str, list[Triple]] = defaultdict(list)
    for triple in triples:
        if triple.why:
            groups[triple.why].append(triple)
    lines = []
    for why, members in groups.items():
        parts = [", ".join(dict.fromkeys(column)) for column in list(zip(*members, strict=True))[:3]]
        lines.append(f"- {' | '.join(parts)} ({len(members)}): {why}.")
    return lines
