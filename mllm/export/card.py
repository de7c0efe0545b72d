"""The model card of an exported model: what it was assembled from, how exact it is, and how it is asked."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mllm.export.stock import Shell
from mllm.hub.embedded_list import PARTS
from mllm.model import Model
from mllm.version import __version__

CARD = """\
---
library_name: transformers
pipeline_tag: image-text-to-text
---

# {title}, assembled by mllm

| part | what | licence |
|---|---|---|
| encoder | {encoder} | {encoder_licence} |
| language model | {lm} | {lm_licence} |
| connector | {connector} | yours: it was trained in this run |
{adapters}
## How exact it is

This folder (`mllm export RUN --to {to}`) was loaded by stock code and compared with the assembled model, in float32,
on the {count} prompts of `probes/probes.json`:

- the largest difference of any logit is {difference:.3g}, where the largest logit is {largest:.3g};
- the greedy tokens are equal on every prompt ({tokens} in all), and so are the ids and the pixels.
{merged}
mllm {mllm}, transformers {transformers}, torch {torch}. The pixels are those of the image processors on PIL; those on
torchvision differ a little.

## How it is asked

```python
from transformers import AutoModelForImageTextToText, AutoProcessor

processor = AutoProcessor.from_pretrained(FOLDER, backend="pil")
model = AutoModelForImageTextToText.from_pretrained(FOLDER)
caption = {caption!r}
question = {question!r}
inputs = processor(images=[picture], text=question.format(question="What is in the picture?"), return_tensors="pt")
answer = model.generate(**inputs, max_new_tokens=20)[:, inputs["input_ids"].shape[1]:]
print(processor.tokenizer.decode(answer[0], skip_special_tokens=True))
```

{where}
"""
MERGED = """
The LoRA adapters were added to the weights, which rounds: hence the difference.
"""


def card(model: Model, to: str, shell: Shell, found: Sequence[dict[str, Any]]) -> str:
    """Return the card's text; ``found`` are the comparisons, probe by probe."""
    spec = model.spec
    worst = max(found, key=lambda one: float(one["difference"]))
    options = ", ".join(f"{key}: {value}" for key, value in spec.connector.options().items())
    prompts = {
        "caption": spec.prompt.template.format(images=shell.image, prompt=spec.prompt.caption),
        "question": spec.prompt.template.format(images=shell.image, prompt=spec.prompt.question),
    }
    return CARD.format(
        title=type(shell.model).__name__,
        to=to,
        encoder=_named(spec.encoder.label),
        encoder_licence=_licence(spec.encoder.label),
        lm=_named(spec.lm.model),
        lm_licence=_licence(spec.lm.model),
        connector=spec.connector.type + (f" ({options})" if options else ""),
        adapters="| adapters | LoRA, added to the weights | yours |\n" if spec.adapters else "",
        merged=MERGED if spec.adapters else "",
        count=len(found),
        difference=worst["difference"],
        largest=worst["largest"],
        tokens=sum(len(one["tokens"]) for one in found),
        mllm=__version__,
        transformers=version("transformers"),
        torch=version("torch"),
        where=(
            "The places of an image are in the text, where it was in training."
            if shell.image
            else "The processor puts the image in front of the text, where it was in training; one image a prompt."
        ),
        **prompts,
    )


def _named(model: str) -> str:
    """Return a hub id or part's name; of a folder, its last name: where it lay here says nothing elsewhere."""
    return Path(model).name if Path(model).is_dir() else model


def _licence(model: str) -> str:
    part = PARTS.get(model)
    return part.licence if part else "not known here: see where the model comes from"
