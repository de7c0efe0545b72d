"""Write the model card of an exported model: its parts, the measured differences, and its usage."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mllm.export.stock import StockModel
from mllm.hub.embedded_list import PARTS
from mllm.model import Model
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
{adapters}
## Equivalence

This folder (`mllm export RUN --to {to}`) was loaded with transformers alone and compared with the original model, in
float32, on the {count} prompts of `probes/probes.json`:

- the largest difference of any logit is {difference:.3g}, where the largest logit is {largest:.3g};
- the greedily decoded tokens are equal on every prompt ({tokens} in total), and so are the input ids and the pixels.
{merged}
mllm {mllm}, transformers {transformers}, torch {torch}. The pixels are those of the image processors on PIL; those on
torchvision differ a little.

## Usage

```python
from transformers import AutoModelForImageTextToText, AutoProcessor

processor = AutoProcessor.from_pretrained(FOLDER, backend="pil")
model = AutoModelForImageTextToText.from_pretrained(FOLDER)
caption = {caption!r}
question = {question!r}
inputs = processor(images=[image], text=question.format(question="What is in the image?"), return_tensors="pt")
answer = model.generate(**inputs, max_new_tokens=20)[:, inputs["input_ids"].shape[1]:]
print(processor.tokenizer.decode(answer[0], skip_special_tokens=True))
```

{where}
"""
MERGED = """
The LoRA adapters were merged into the weights; the difference comes from rounding.
"""


def card(model: Model, to: str, stock: StockModel, comparisons: Sequence[dict[str, Any]]) -> str:
    """Return the card's text, from the comparisons on each probe."""
    spec = model.spec
    worst = max(comparisons, key=lambda comparison: float(comparison["difference"]))
    options = ", ".join(f"{key}: {value}" for key, value in spec.connector.options().items())
    prompts = {
        "caption": spec.prompt.template.format(images=stock.image, prompt=spec.prompt.caption),
        "question": spec.prompt.template.format(images=stock.image, prompt=spec.prompt.question),
    }
    return CARD.format(
        title=type(stock.model).__name__,
        to=to,
        encoder=_display_name(spec.encoder.label),
        encoder_licence=_licence(spec.encoder.label),
        lm=_display_name(spec.lm.model),
        lm_licence=_licence(spec.lm.model),
        connector=spec.connector.type + (f" ({options})" if options else ""),
        adapters="| adapters | LoRA, merged into the weights | yours |\n" if spec.adapters else "",
        merged=MERGED if spec.adapters else "",
        count=len(comparisons),
        difference=worst["difference"],
        largest=worst["largest"],
        tokens=sum(len(comparison["tokens"]) for comparison in comparisons),
        mllm=__version__,
        transformers=version("transformers"),
        torch=version("torch"),
        where=(
            "The image tokens are in the text, at the position that they had in training."
            if stock.image
            else "The processor puts the image before the text, as in training; there is one image per prompt."
        ),
        **prompts,
    )


def _display_name(model: str) -> str:
    """Return a hub id or part's name; of a folder, the last component of its path."""
    return Path(model).name if Path(model).is_dir() else model


def _licence(model: str) -> str:
    part = PARTS.get(model)
    return part.licence if part else "unknown: see the model's source"
