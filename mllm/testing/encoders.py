"""Build tiny encoders with random weights, one for each model family, for the tests and the matrix in docs/.

Class names are strings, so a class of `transformers` is imported only when a model is built.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

from mllm.devices import forked_rng


@dataclass(frozen=True)
class EncoderFamily:
    """The configuration of a tiny model of one family; called with a folder, it saves model and processor there.

    Args:
        name: the prefix of the classes in `transformers`, before ``Config`` and ``Model``.
        config: arguments of the configuration class.
        processor: the class of the image processor; for one that needs torchvision, only its JSON file is written.
        settings: arguments of the processor.
    """

    name: str
    config: dict[str, Any]
    processor: str = "ViTImageProcessorPil"
    settings: dict[str, Any] = field(default_factory=dict)

    def __call__(self, folder: Path, *, seed: int = 0) -> str:
        """Save a model with random weights and its image processor, and return the folder."""
        with forked_rng(seed):
            config = getattr(transformers, f"{self.name}Config")(**self.config)
            model = getattr(transformers, f"{self.name}Model")(config)
            spread(model)
        model.save_pretrained(folder)
        settings = self.settings if "Feature" in self.processor else {"size": square(32), **self.settings}
        if self.processor.endswith(("Pil", "FeatureExtractor")):
            getattr(transformers, self.processor)(**settings).save_pretrained(folder)
        else:
            settings |= {"image_processor_type": self.processor, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
            settings |= {"do_resize": True, "do_rescale": True, "do_normalize": True, "resample": 2}
            (Path(folder) / "preprocessor_config.json").write_text(json.dumps(settings))
        return str(folder)


def spread(model: Any) -> None:
    """Initialize a convolutional model so that activations keep their scale through many layers (He et al. 2015)."""
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        elif isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.ones_(module.weight)


def square(side: int) -> dict[str, int]:
    """Return a square size in the format of image processors."""
    return {"height": side, "width": side}


VIT: dict[str, Any] = {
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "image_size": 32,
    "patch_size": 8,
}
DECODER = {f"decoder_{key}": 16 for key in ("hidden_size", "num_hidden_layers", "intermediate_size")}
WINDOWS = {"image_size": 32, "patch_size": 4, "embed_dim": 8, "depths": [1, 1, 1], "num_heads": [1, 2, 2]}
STAGES = {"hidden_sizes": [8, 8, 16, 24], "depths": [1, 1, 1, 1]}
HEADS = {"num_attention_heads": [1, 1, 2, 2]}
CROPPED = {"size": {"shortest_edge": 36}, "crop_size": square(32)}
EDGE = {"size": {"shortest_edge": 64}}
FAMILIES: dict[str, EncoderFamily] = {
    "clip": EncoderFamily("CLIPVision", VIT, "CLIPImageProcessorPil", CROPPED),
    "siglip": EncoderFamily("SiglipVision", VIT, "SiglipImageProcessorPil"),
    "siglip2-naflex": EncoderFamily(
        "Siglip2Vision",
        {key: value for key, value in VIT.items() if key != "image_size"} | {"num_patches": 16},
        "Siglip2ImageProcessorPil",
        {"patch_size": 8, "max_num_patches": 16},
    ),
    "dinov2": EncoderFamily("Dinov2", VIT, "BitImageProcessorPil", CROPPED),
    "dinov2-registers": EncoderFamily(
        "Dinov2WithRegisters", VIT | {"num_register_tokens": 4}, "BitImageProcessorPil", CROPPED
    ),
    "dinov3": EncoderFamily("DINOv3ViT", VIT | {"num_register_tokens": 4}, "DINOv3ViTImageProcessorFast"),
    "vit": EncoderFamily("ViT", VIT),
    "beit": EncoderFamily("Beit", VIT | {"use_relative_position_bias": True}, "BeitImageProcessorPil"),
    "vit-mae": EncoderFamily(
        "ViTMAE", VIT | DECODER | {"decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2}
    ),
    "deit": EncoderFamily("DeiT", VIT, "DeiTImageProcessorPil", {"crop_size": square(32)}),
    "ijepa": EncoderFamily("IJepa", VIT),
    "swin": EncoderFamily("Swin", WINDOWS | {"window_size": 2}),
    "swinv2": EncoderFamily("Swinv2", WINDOWS | {"window_size": 2}),
    "focalnet": EncoderFamily(
        "FocalNet", {"image_size": 32, "embed_dim": 8, "depths": [1, 1]}, "BitImageProcessorPil", CROPPED
    ),
    "pvt-v2": EncoderFamily("PvtV2", STAGES | HEADS | {"image_size": 64}, settings={"size": square(64)}),
    "segformer": EncoderFamily("Segformer", STAGES | HEADS, "SegformerImageProcessorPil", {"size": square(64)}),
    "convnext": EncoderFamily("ConvNext", STAGES, "ConvNextImageProcessorPil", EDGE),
    "dinov3-convnext": EncoderFamily("DINOv3ConvNext", STAGES, "DINOv3ViTImageProcessorFast", {"size": square(64)}),
    "resnet": EncoderFamily(
        "ResNet", STAGES | {"embedding_size": 8, "layer_type": "basic"}, "ConvNextImageProcessorPil", EDGE
    ),
    "regnet": EncoderFamily(
        "RegNet", STAGES | {"embedding_size": 8, "groups_width": 4}, "ConvNextImageProcessorPil", EDGE
    ),
    "efficientnet": EncoderFamily(
        "EfficientNet",
        {"image_size": 64, "width_coefficient": 0.1, "hidden_dim": 128, "num_block_repeats": [1] * 3}
        | {
            "kernel_sizes": [3] * 3,
            "strides": [2] * 3,
            "expand_ratios": [1, 2, 2],
            "in_channels": [32, 80, 160],
            "out_channels": [80, 160, 320],
            "depthwise_padding": [],
        },
        "EfficientNetImageProcessorPil",
        {"size": square(64)},
    ),
    "mobilenet-v2": EncoderFamily(
        "MobileNetV2",
        {"image_size": 64, "depth_multiplier": 0.1, "finegrained_output": False},
        "MobileNetV2ImageProcessorPil",
        {"size": {"shortest_edge": 72}, "crop_size": square(64)},
    ),
}
ENCODER_FAMILIES: dict[str, Callable[[Path], str]] = dict(FAMILIES)


AUDIO: dict[str, Any] = {
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "conv_dim": [16, 16],
    "conv_kernel": [10, 8],
    "conv_stride": [20, 16],
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
}
WHISPER = {"d_model": 24, "num_mel_bins": 16, "max_source_positions": 50, "vocab_size": 20, "pad_token_id": 0} | {
    f"{part}_{key}": value
    for part in ("encoder", "decoder")
    for key, value in {"layers": 3, "attention_heads": 2, "ffn_dim": 48}.items()
}
SPECTROGRAM = {"feature_size": 16, "chunk_length": 1}
AUDIO_FAMILIES: dict[str, Callable[[Path], str]] = {
    "whisper": EncoderFamily("Whisper", WHISPER, "WhisperFeatureExtractor", SPECTROGRAM),
    "wav2vec2": EncoderFamily("Wav2Vec2", AUDIO, "Wav2Vec2FeatureExtractor", {}),
    "hubert": EncoderFamily(
        "Hubert",
        AUDIO | {"feat_extract_norm": "layer", "do_stable_layer_norm": True, "conv_bias": True},
        "Wav2Vec2FeatureExtractor",
        {"return_attention_mask": True},
    ),
}
