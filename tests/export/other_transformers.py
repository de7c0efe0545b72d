"""Run by the Python of another transformers: print as JSON what its own classes are called, or what a folder answers.

    python other_transformers.py names
    python other_transformers.py answers FOLDER...

The names are those of the weights in the files that this transformers saves of its own classes, built here from their
configurations alone. With transformers 4.57.6 they are in `names_4_57.json`. This file imports nothing of mllm.
"""

from __future__ import annotations

import json
import logging
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from safetensors import safe_open

LAYERS: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
    "pad_token_id": 0,
}
VISION: dict[str, Any] = {
    "hidden_size": 24,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
ENCODERS = {"clip": "clip_vision_model", "siglip": "siglip_vision_model", "dinov2": "dinov2", "vit": "vit"}
LMS: dict[str, dict[str, Any]] = {
    **{name: {} for name in ("llama", "mistral", "qwen2", "qwen3", "phi3", "olmo2", "stablelm", "smollm3")},
    "mixtral": {"num_local_experts": 4},
    "gemma3": {"head_dim": 8},
}
TWO_LAYERS = {**VISION, "num_hidden_layers": 2}  # of BLIP-2's vision model and Q-Former
BLIP2_LMS: dict[str, dict[str, Any]] = {
    "opt": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "word_embed_proj_dim": 32},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4},
    "llama": {},
}


def names() -> dict[str, str]:
    """Return the names of the weights that this transformers saves, by encoder and language model."""
    config = transformers.AutoConfig.for_model
    listed: dict[str, str] = {}
    for encoder, lm in [*((encoder, "llama") for encoder in ENCODERS), *(("clip", lm) for lm in LMS)]:
        kind = "gemma3_text" if lm == "gemma3" else lm
        text = config(kind, **LAYERS, **LMS[lm], tie_word_embeddings=False)
        llava = transformers.LlavaConfig(vision_config=config(ENCODERS[encoder], **VISION), text_config=text)
        listed[f"llava {encoder} {lm}"] = _saved_names(transformers.LlavaForConditionalGeneration(llava))
    for lm, shape in BLIP2_LMS.items():
        text = config(lm, **{**(LAYERS if lm == "llama" else {"vocab_size": 300}), **shape}, tie_word_embeddings=False)
        blip2 = transformers.Blip2Config(
            vision_config=transformers.Blip2VisionConfig(**TWO_LAYERS).to_dict(),
            qformer_config=transformers.Blip2QFormerConfig(**TWO_LAYERS, encoder_hidden_size=24).to_dict(),
            text_config=text.to_dict(),
        )
        listed[f"blip2 {lm}"] = _saved_names(transformers.Blip2ForConditionalGeneration(blip2))
    return listed


def _saved_names(model: Any) -> str:
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        with safe_open(Path(folder) / "model.safetensors", "pt") as weights:
            return " ".join(sorted(weights.keys()))


@torch.no_grad()
def answers(folder: Path) -> dict[str, Any]:
    """Return what a folder answers in a batch of several lengths, to a conversation, and what it lacks."""
    auto: Any = transformers.AutoModelForImageTextToText
    model, info = auto.from_pretrained(folder, output_loading_info=True)
    older = {"use_fast": False} if transformers.__version__.startswith("4.") else {"backend": "pil"}
    processor = transformers.AutoProcessor.from_pretrained(folder, **older)
    first, second = (Image.open(folder / "probes" / f"{number}.png") for number in (1, 2))
    texts = ["<image>short", "a much longer <image> prompt than that", "<image>x<image>two"]
    images = [[first], [second], [first, second]]
    inputs = processor(images=images, text=texts, padding=True, return_tensors="pt")
    new = model.eval().generate(**inputs, max_new_tokens=12, min_new_tokens=12)[:, inputs["input_ids"].shape[1] :]
    content = [{"type": "image", "image": first}, {"type": "text", "text": "what is it?"}]
    chat = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    reply = model.generate(**chat, max_new_tokens=12, min_new_tokens=12)[:, chat["input_ids"].shape[1] :]
    return {
        "lacks": sorted([*info["missing_keys"], *info["unexpected_keys"]]),
        "ids": inputs["input_ids"].tolist(),
        "mask": inputs["attention_mask"].tolist(),
        "pixels": inputs["pixel_values"].double().sum().item(),
        "tokens": new.tolist(),
        "chat": [chat["input_ids"].tolist(), reply.tolist()],
    }


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    task, *folders = sys.argv[1:]
    print(
        json.dumps(names(), indent=1) if task == "names" else json.dumps([answers(Path(folder)) for folder in folders])
    )
