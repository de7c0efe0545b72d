"""Train the alternative to `mllm train`: `transformers`' Trainer on its LLaVA class, or on a hand-written module."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    LlavaForConditionalGeneration,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from mllm.prompts.batch import IGNORED


class Joined(nn.Module):
    """An encoder, one linear layer and a language model; patches are average-pooled to cells."""

    def __init__(self, encoder: nn.Module, lm: nn.Module, *, cells: int, dim: int, lm_dim: int) -> None:
        super().__init__()
        self.encoder, self.lm, self.cells = encoder, lm, cells
        self.connector = nn.Linear(dim, lm_dim)
        encoder.requires_grad_(False)
        lm.requires_grad_(False)

    def train(self, mode: bool = True) -> Joined:
        """Set training mode for the connector alone."""
        super().train(mode)
        self.encoder.eval()
        self.lm.eval()
        return self

    def forward(
        self, pixel_values: Tensor, input_ids: Tensor, visual: Tensor, attention_mask: Tensor, labels: Tensor
    ) -> Any:
        """Return the language model's output, including ``loss``."""
        with torch.no_grad():
            maps = self.encoder(pixel_values).last_hidden_state
            embeds = self.lm.get_input_embeddings()(input_ids)  # type: ignore[operator]
        if maps.ndim == 3:  # a class token, then patches
            maps = rearrange(maps[:, 1:], "b (h w) d -> b d h w", h=int((maps.shape[1] - 1) ** 0.5))
        pooled = rearrange(adaptive_avg_pool2d(maps, self.cells), "b d h w -> b (h w) d")
        embeds = embeds.masked_scatter(visual[..., None], self.connector(pooled))
        return self.lm(inputs_embeds=embeds, attention_mask=attention_mask, labels=labels)


class Collator:
    """Collate rows of a JSON file to a batch, padded on the right."""

    def __init__(self, processor: Any, options: dict[str, Any], *, visual: bool) -> None:
        self.processor, self.options, self.visual = processor, options, visual

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Return the tensors of a batch, with the images opened and preprocessed."""
        images = [Image.open(row["image"]).convert("RGB") for row in rows]
        batch = self.processor(images=images, return_tensors="pt", **self.options)
        width = max(len(row["ids"]) for row in rows)

        def padded(key: str, fill: Any) -> Tensor:
            return torch.tensor([row[key] + [fill] * (width - len(row[key])) for row in rows])

        mask = [[1] * len(row["ids"]) + [0] * (width - len(row["ids"])) for row in rows]
        made = {
            "input_ids": padded("ids", 0),
            "attention_mask": torch.tensor(mask),
            "labels": padded("labels", IGNORED),
        }
        return {**made, **({"visual": padded("visual", False)} if self.visual else {}), **batch}


class Log(TrainerCallback):
    """Write a line for each step, as `mllm train` does."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, **row: Any) -> None:
        """Append a line."""
        with self.path.open("a") as stream:
            stream.write(json.dumps(row) + "\n")

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Write a file when the parts are loaded."""
        (self.path.parent / "recipe.yaml").touch()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Write a line when a step has ended."""
        self.write(step=state.global_step, loss=None)


def train(description: str, *, out: str) -> None:
    """Train as a JSON file describes, and log to ``out``.

    The file has ``kind`` (``llava``: a folder of that class in ``model``; ``joined``: ``parts``, see `joined`),
    ``processor`` and its ``options``, ``rows``, ``val``, ``batch_size``, ``steps`` and ``rate``.
    """
    settings = json.loads(Path(description).read_text())
    Path(out).mkdir(parents=True)
    torch.manual_seed(0)
    model = llava(settings["model"]) if settings["kind"] == "llava" else joined(**settings["parts"])
    log = Log(Path(out) / "log.jsonl")
    collator = collator_of(settings)
    arguments = TrainingArguments(
        output_dir=out,
        per_device_train_batch_size=settings["batch_size"],
        max_steps=settings["steps"],
        learning_rate=settings["rate"],
        lr_scheduler_type="cosine",
        warmup_steps=10,
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        use_cpu=True,
        dataloader_pin_memory=False,
    )
    Trainer(model, arguments, data_collator=collator, train_dataset=settings["rows"], callbacks=[log]).train()
    if settings["val"]:
        log.write(step=settings["steps"], val_loss=validation_loss(model, collator, settings["val"]))


def collator_of(settings: dict[str, Any]) -> Collator:
    """Return the collator of a description's rows."""
    return Collator(
        AutoImageProcessor.from_pretrained(settings["processor"], trust_remote_code=False),
        settings["options"],
        visual=settings["kind"] != "llava",
    )


def llava(folder: str) -> nn.Module:
    """Return `transformers`' LLaVA class, frozen except for its projector."""
    model = LlavaForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, trust_remote_code=False
    ).requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(True)
    return model


def joined(encoder: str, lm: str, cells: int, dim: int) -> Joined:
    """Return the hand-written module with a randomly initialized connector; ``dim`` is the encoder's width."""
    language = AutoModelForCausalLM.from_pretrained(lm, dtype=torch.float32, trust_remote_code=False)
    vision = AutoModel.from_pretrained(encoder, dtype=torch.float32, trust_remote_code=False)
    table: Any = language.get_input_embeddings()
    return Joined(getattr(vision, "vision_model", vision), language, cells=cells, dim=dim, lm_dim=table.weight.shape[1])


@torch.no_grad()
def validation_loss(model: nn.Module, collator: Collator, rows: Sequence[dict[str, Any]], size: int = 32) -> float:
    """Return the mean loss over target tokens."""
    model.eval()
    total, count = 0.0, 0
    for start in range(0, len(rows), size):
        batch = collator(rows[start : start + size])
        number = int((batch["labels"][:, 1:] != IGNORED).sum())
        total, count = total + float(model(**batch).loss) * number, count + number
    return total / count
