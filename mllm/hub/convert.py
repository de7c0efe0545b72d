"""Convert the files of a pinned package to a folder that the Auto classes of `transformers` load.

Each function reads the unpacked files in ``source`` and writes to ``target``. They run once, when a part is installed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

SIZE = 224  # side of the training images of both encoders, in pixels
IMAGENET_MEAN = [0.485, 0.456, 0.406]  # of RGB values in 0..1
IMAGENET_STD = [0.229, 0.224, 0.225]


def mobilenet_v2(source: Path, target: Path) -> None:
    """Convert ``source/weights.pt`` to a MobileNetV2 of `transformers`, with its image processor.

    Both networks list their tensors in data-flow order, so the k-th tensor of one is the k-th of the other.
    """
    import torch
    from transformers import MobileNetV2Config, MobileNetV2Model

    weights = torch.load(source / "weights.pt", map_location="cpu", weights_only=True)
    # The defaults of tf_padding and the epsilon are TensorFlow's, but these weights come from PyTorch.
    model = MobileNetV2Model(MobileNetV2Config(tf_padding=False, layer_norm_eps=1e-5))
    target_state = model.state_dict()
    assert [tensor.shape for tensor in target_state.values()] == [tensor.shape for tensor in weights.values()]
    model.load_state_dict(dict(zip(target_state, weights.values(), strict=True)))
    model.save_pretrained(target)
    _processor(target, IMAGENET_MEAN, IMAGENET_STD)


def efficientnet_lite0(source: Path, target: Path) -> None:
    """Convert ``source/weights.pth`` to an EfficientNet of `transformers`, without the classifier.

    Lite models have no squeeze-and-excitation layers: here these multiply by exactly 1, due to a large bias. The other
    tensors are in the same order.
    """
    import torch
    from transformers import EfficientNetConfig, EfficientNetModel

    weights = torch.load(source / "weights.pth", map_location="cpu", weights_only=True)
    values = iter([tensor for name, tensor in weights.items() if not name.startswith("_fc")])
    sizes: dict[str, Any] = {"image_size": SIZE, "hidden_dim": 1280, "width_coefficient": 1.0, "depth_coefficient": 1.0}
    config = EfficientNetConfig(**sizes, num_block_repeats=[1, 2, 2, 3, 3, 4, 1], hidden_act="relu6")
    model = EfficientNetModel(config)
    target_state = model.state_dict()
    for name, tensor in target_state.items():
        if ".squeeze_excite." in name:
            target_state[name] = torch.full_like(tensor, 100.0 if name.endswith("expand.bias") else 0.0)
        else:
            target_state[name] = next(values)
    assert next(values, None) is None
    model.load_state_dict(target_state)
    model.save_pretrained(target)
    _processor(target, [127 / 255] * 3, [128 / 255] * 3)


def _processor(target: Path, mean: list[float], std: list[float]) -> None:
    """Write preprocessor_config.json: resize to a square without cropping, scale to 0..1, normalize."""
    # The file names no backend, so Pillow or torchvision can load it; this class itself needs Pillow only.
    from transformers.models.mobilenet_v2.image_processing_pil_mobilenet_v2 import MobileNetV2ImageProcessorPil

    processor = MobileNetV2ImageProcessorPil(
        size={"height": SIZE, "width": SIZE},
        do_center_crop=False,
        do_convert_rgb=True,
        rescale_factor=1 / 255,
        image_mean=mean,
        image_std=std,
    )
    processor.save_pretrained(target)


def smollm2(source: Path, target: Path) -> None:
    """Convert ``source/model.gguf`` to a float32 Llama with its tokenizer and chat template.

    A Q4_1 weight is scale * q + minimum, which float32 represents without the rounding of bfloat16.
    """
    import torch
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoModelForCausalLM, AutoTokenizer

    file = "model.gguf"
    dequantized = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=file, dtype=torch.float32, trust_remote_code=False
    )
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=file, trust_remote_code=False)
    # The file specifies the pre-tokenizer "smollm" (each digit is a token), which transformers ignores.
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
    )
    # A model loaded from GGUF is marked as quantized and cannot be saved, so its tensors are copied to a plain model.
    config = dequantized.config
    del config.quantization_config
    plain = type(dequantized)(config)
    plain.load_state_dict(dequantized.state_dict())
    plain.save_pretrained(target)
    tokenizer.save_pretrained(target)
