"""Write the model card of an exported model: its parts, the measured differences, and its usage."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mllm.export.compare import Comparison
from mllm.export.files import needs_5
from mllm.export.stock import IMAGE
from mllm.hub.embedded_list import PARTS
from mllm.model import Model
from mllm.prompts.formatting import formatted
from mllm.version import __version__

CARD = """\
---
library_name: transformers
pipeline_tag: image-text-to-text
---

# {title}, assembled by mllm

| part | name | licence |
|---|---|---|
| encoder | {encoder} | {encoder_licence} |
| language model | {lm} | {lm_licence} |
| connector | {connector} | yours: it was trained in this run |
{adapters}{remote}
## Equivalence

This folder (`mllm export RUN --to {to} --dtype {dtype}`) was loaded with transformers alone and compared with the
original model, which computed in float32, on the {count} prompts and conversations of `probes/probes.json`, which were
decoded in batches of several lengths. The input ids and the pixels are equal.

{equivalence}
{merged}{several}
mllm {mllm}, transformers {transformers}, torch {torch}. The pixels are those of the image processors on PIL; those on
torchvision differ a little. {versions}

## Usage

```python
from transformers import pipeline

pipe = pipeline("image-text-to-text", model=FOLDER)
content = [{{"type": "image", "image": image}}, {{"type": "text", "text": "What is in the image?"}}]
print(pipe(text=[{{"role": "user", "content": content}}], max_new_tokens=20, return_full_text=False))
```

The chat template formats messages as in training. The other prompts of the training, where `<image>` is an image:

```python
from transformers import AutoModelForImageTextToText, AutoProcessor

processor = AutoProcessor.from_pretrained(FOLDER{backend}
model = AutoModelForImageTextToText.from_pretrained(FOLDER, dtype="auto")
caption = {caption!r}
question = {question!r}
inputs = processor(images=[image], text=question.replace("{{question}}", "What is in the image?"), return_tensors="pt")
answer = model.generate(**inputs.to(model.dtype), max_new_tokens=20)[:, inputs["input_ids"].shape[1]:]
print(processor.tokenizer.decode(answer[0], skip_special_tokens=True))
```
"""
EXACTLY = """\
- The largest difference of any logit is {difference:.3g}, where the largest logit is {largest:.3g}; {allowed:g} of it
  is allowed.
- The greedily decoded tokens are equal on every prompt ({tokens} in total)."""
ROUNDED = """\
- Before the weights were rounded to {dtype}, the class in float32 decoded the same {tokens} tokens, and its logits were
  equal to {exact:g} of the largest.
- In {dtype}, the largest difference of any logit is {share:.2g} of the largest logit; {allowed:.2g} is allowed, from
  what rounding to {dtype} changes in the original model. {equal} of the {count} greedy answers are those in float32."""
MERGED = """
The LoRA adapters were merged into the weights; the difference comes from rounding.
"""
WITH_VIDEOS = ("hf-internvl", "hf-llava-onevision")  # whose processors have a video processor
BY_PIL = ', backend="pil")  # transformers 4.57: use_fast=False'
NEEDS_TORCHVISION = ")  # it needs torchvision, as the pipeline does, for its video processor"
TILES = "Load this folder with transformers 5; 4.57 was not compared."
BOTH = "transformers 4.57 reads the folder, too."
ONLY_5 = """\
**Load this folder with transformers 5:** in 4.57 this language model scales the visual tokens as it scales its
embeddings, and the answers are others."""


def card(
    model: Model,
    to: str,
    stock: Any,
    comparisons: Sequence[Comparison],
    *,
    allowed: float,
    exact: float,
    several: str = "",
) -> str:
    """Return the card's text.

    Args:
        model: the original.
        to: the format.
        stock: the transformers model, as loaded from the folder.
        comparisons: on each probe.
        allowed: the largest difference of logits that was allowed, as a share of the largest logit.
        exact: the same of the comparison in float32.
        several: see `mllm.export.stock.StockModel`.
    """
    spec, dtype = model.spec, str(stock.dtype).removeprefix("torch.")
    options = ", ".join(f"{key}: {value}" for key, value in spec.connector.options().items())
    prompts = {
        "caption": "".join(formatted(spec.prompt, [IMAGE], spec.prompt.caption)),
        "question": "".join(formatted(spec.prompt, [IMAGE], spec.prompt.question)),
    }
    return CARD.format(
        title=type(stock).__name__,
        to=to,
        dtype=dtype,
        encoder=_display_name(spec.encoder.label),
        encoder_licence=_licence(spec.encoder.label),
        lm=_display_name(spec.lm.model),
        lm_licence=_licence(spec.lm.model),
        connector=spec.connector.type + (f" ({options})" if options else ""),
        adapters="| adapters | LoRA, merged into the weights | yours |\n" if spec.adapters else "",
        remote=_remote(spec.remote_code()),
        merged=MERGED if spec.adapters else "",
        several=f"\n{several}\n" if several else "",
        backend=NEEDS_TORCHVISION if to in WITH_VIDEOS else BY_PIL,
        count=len(comparisons),
        equivalence=_equivalence(comparisons, dtype, allowed, exact),
        mllm=__version__,
        transformers=version("transformers"),
        torch=version("torch"),
        versions=TILES if model.tiling is not None else ONLY_5 if needs_5(stock.config) else BOTH,
        **prompts,
    )


def _equivalence(comparisons: Sequence[Comparison], dtype: str, allowed: float, exact: float) -> str:
    """Return the sentences on the differences."""
    worst = max(comparisons, key=lambda one: one.difference)
    return (EXACTLY if dtype == "float32" else ROUNDED).format(
        dtype=dtype,
        difference=worst.difference,
        largest=worst.largest,
        share=max(one.difference / max(one.largest, 1e-12) for one in comparisons),
        allowed=allowed,
        exact=exact,
        tokens=sum(len(one.tokens) for one in comparisons),
        equal=sum(one.tokens == one.stock for one in comparisons),
        count=len(comparisons),
    )


def _remote(allowed: dict[str, str]) -> str:
    """Return the sentence on the parts that ran code of their repositories; this folder needs none."""
    if not allowed:
        return ""
    names = ", ".join(f"{path} ({_display_name(model)})" for path, model in allowed.items())
    return f"\nTrained with `trust_remote_code` for {names}: code of those repositories was run.\n"


def _display_name(model: str) -> str:
    """Return a hub id or part's name; of a folder, the last component of its path."""
    return Path(model).name if os.path.isdir(model) else model


def _licence(model: str) -> str:
    part = PARTS.get(model)
    return part.licence if part else "unknown: see the model's source"
