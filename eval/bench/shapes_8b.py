"""The shapes of CLIP-L/336 and an 8B Llama, without weights, and JPEGs: what a GPU is timed with.

Weights are drawn on the GPU, and nothing is hashed: 16 GB take minutes on a processor's core, and no time depends on
values.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import transformers
from PIL import Image
from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPVisionConfig, LlamaConfig

from mllm.encoders.base import on_meta
from mllm.testing import tiny_lm

CAPTION = "a thing of many colors, seen from the side"

VISION: dict[str, Any] = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24}
VISION |= {"num_attention_heads": 16, "image_size": 336, "patch_size": 14}
TEXT: dict[str, Any] = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
TEXT |= {"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256}
TINY_VISION = {**VISION, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
TINY_TEXT = {**TEXT, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
TINY_TEXT |= {"num_key_value_heads": 2, "vocab_size": 512}


@dataclass(frozen=True)
class Place:
    """A folder of configurations and images.

    Args:
        folder: of ``vision``, ``text``, ``images`` and ``rows.json``.
        vision: the fields of the encoder's configuration.
        text: those of the language model's.
        device: ``cuda``; ``cpu`` shows that it runs.
    """

    folder: Path
    vision: dict[str, Any] = field(default_factory=lambda: VISION)
    text: dict[str, Any] = field(default_factory=lambda: TEXT)
    device: str = "cuda"

    def write(self, images: int = 256) -> Place:
        """Write configurations, a tokenizer of bytes, and JPEGs of 640 x 480 with captions; return the place."""
        CLIPVisionConfig(**self.vision).save_pretrained(self.folder / "vision")
        side = self.vision["image_size"]
        processor = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
        processor.save_pretrained(self.folder / "vision")
        tiny_lm(self.folder / "text")
        tokenizer = AutoTokenizer.from_pretrained(self.folder / "text", trust_remote_code=False)
        special = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
        config = LlamaConfig(**self.text, **special, max_position_embeddings=8192, dtype="bfloat16")
        config.save_pretrained(self.folder / "text")
        (self.folder / "images").mkdir()
        draw, rows = np.random.default_rng(0), []
        for index in range(images):
            noise = Image.fromarray(draw.integers(0, 256, (30, 40, 3), dtype=np.uint8))
            noise.resize((640, 480), Image.Resampling.BICUBIC).save(self.folder / f"images/{index}.jpg", quality=88)
            turns = [{"from": "human", "value": "<image>\nDescribe."}, {"from": "gpt", "value": CAPTION}]
            rows.append({"id": str(index), "image": f"{index}.jpg", "conversations": turns})
        (self.folder / "rows.json").write_text(json.dumps(rows))
        return self

    @property
    def visual(self) -> int:
        """The visual tokens of an image."""
        return int(self.vision["image_size"] // self.vision["patch_size"]) ** 2

    def parameters(self) -> int:
        """Return the number of the language model's weights that compute: without the table of embeddings."""
        with torch.device("meta"):
            config = LlamaConfig.from_pretrained(self.folder / "text", trust_remote_code=False)
            model = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        return sum(p.numel() for p in model.parameters()) - model.get_input_embeddings().weight.numel()

    def tower(self) -> int:
        """Return the number of the encoder's weights."""
        with torch.device("meta"):
            config = CLIPVisionConfig.from_pretrained(self.folder / "vision", trust_remote_code=False)
            model = transformers.AutoModel.from_config(config, trust_remote_code=False)
        return sum(parameter.numel() for parameter in model.parameters())


@contextlib.contextmanager
def drawn_on(device: str) -> Iterator[None]:
    """Draw the weights of language models on a device, in the configuration's type, and hash no tensors."""
    from_config = transformers.AutoModelForCausalLM.from_config

    def draws(config: Any, **options: Any) -> Any:
        with contextlib.nullcontext() if on_meta() else torch.device(device):
            return from_config(config, **options)  # type: ignore[no-untyped-call]

    with contextlib.ExitStack() as patches:
        patches.enter_context(mock.patch.object(transformers.AutoModelForCausalLM, "from_config", draws))
        for module in ("parts", "encoders.base", "lms.language_model"):
            patches.enter_context(mock.patch(f"mllm.{module}.tensor_hash", lambda *_, **__: "not hashed"))
        yield
