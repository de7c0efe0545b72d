"""Create tiny parts with random weights, saved in the format of `transformers`, for tests here and of plug-ins.

They are loaded from a folder like pretrained ones. A tiny model is created in well under a second.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tokenizers import processors
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPProcessor,
    LlamaConfig,
    LlamaForCausalLM,
    ViTConfig,
    ViTImageProcessorPil,
    ViTModel,
)

from mllm.testing.encoders import AUDIO_FAMILIES as AUDIO_FAMILIES
from mllm.testing.encoders import ENCODER_FAMILIES as ENCODER_FAMILIES
from mllm.testing.lms import END
from mllm.testing.lms import LM_FAMILIES as LM_FAMILIES
from mllm.testing.lms import tiny_tokenizer as tiny_tokenizer


def tiny_encoder(folder: Path, *, seed: int = 0, dim: int = 24, side: int = 32, patch: int = 8) -> str:
    """Save a two-layer ViT for ``side`` x ``side`` pixels (by default 16 patches, width 24), and return its folder."""
    torch.manual_seed(seed)
    config = ViTConfig(
        hidden_size=dim,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=2 * dim,
        image_size=side,
        patch_size=patch,
    )
    ViTModel(config).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": side, "width": side}).save_pretrained(folder)
    return str(folder)


def tiny_lm(folder: Path, *, seed: int = 0, dim: int = 32, context: int = 256, layers: int = 2) -> str:
    """Save a Llama over bytes (two layers, 258 tokens, width 32) with its tokenizer, and return its folder."""
    torch.manual_seed(seed)
    tokenizer = tiny_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=dim,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=2 * dim,
        max_position_embeddings=context,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.2,  # wide enough that different inputs give clearly different logits
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def tiny_clip(folder: Path, *, seed: int = 0) -> str:
    """Save a two-layer CLIP over bytes (vectors of width 12, at most 64 tokens), and return its folder."""
    torch.manual_seed(seed)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    tokenizer = tiny_tokenizer()
    tokenizer.model_max_length = 64
    end = processors.TemplateProcessing(single=f"$A {END}", special_tokens=[(END, tokenizer.eos_token_id)])
    tokenizer.backend_tokenizer.post_processor = end  # CLIP reads a text's vector at its end
    text = {**shape, "vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    text |= {"max_position_embeddings": tokenizer.model_max_length, "bos_token_id": None, "pad_token_id": None}
    vision = {**shape, "image_size": 32, "patch_size": 8}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)).save_pretrained(folder)
    images = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(images, tokenizer).save_pretrained(folder)
    return str(folder)


def tiny_image(seed: int = 0, size: tuple[int, int] = (40, 32)) -> Image.Image:
    """Return an RGB image of noise."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (size[1], size[0], 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def tiny_video(path: Path, frames: Sequence[Image.Image], rate: int = 10) -> Path:
    """Write images of one size as a video, ``rate`` frames per second, and return its path."""
    av: Any = import_module("av")
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=rate)
        stream.width, stream.height, stream.pix_fmt = *frames[0].size, "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_image(frame.convert("RGB"))))
        container.mux(stream.encode())
    return path
