"""Make the processors of classes that cut images into tiles, and read the processor of an exported folder.

The processors of InternVL and LLaVA-OneVision have a video processor, which needs torchvision. Here they are without
it; their files name it, so that with torchvision `AutoProcessor` reads them whole.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoProcessor, InternVLProcessor, LlavaNextProcessor, LlavaOnevisionProcessor, ProcessorMixin

from mllm.export.images import tiles_processor
from mllm.export.stock import IMAGE, VIDEO
from mllm.media.tilings import AnyResolution, DynamicResolution
from mllm.model import Model

VIDEO_KEYS = ("size", "resample", "rescale_factor", "image_mean", "image_std")


class ImagesAlone(ProcessorMixin):
    """A processor without the video processor of its class, whose name it has; see `images_alone`."""

    @classmethod
    def get_attributes(cls) -> list[str]:
        """Return the names of the processors that it is made of."""
        return ["image_processor", "tokenizer"]

    def to_dict(self) -> dict[str, Any]:
        """Return what is saved, with a video processor that prepares frames as images are prepared."""
        values = super().to_dict()
        shared = {key: value for key, value in values["image_processor"].items() if key in VIDEO_KEYS}
        kind = type(self).__name__.replace("Processor", "VideoProcessor")
        return {**values, "video_processor": {"video_processor_type": kind, **shared}}


def images_alone(kind: Any) -> Any:
    """Return a processor's class without its video processor."""
    return type(kind.__name__, (ImagesAlone, kind), {})


def read_processor(folder: Path, kind: type) -> Any:
    """Return the processor of an exported folder, which prepares images by PIL.

    Args:
        folder: the folder.
        kind: the class of the processor that was saved.
    """
    reader: Any = kind if issubclass(kind, ImagesAlone) else AutoProcessor
    return reader.from_pretrained(folder, backend="pil", trust_remote_code=False)


def next_processor(
    model: Model, tiling: AnyResolution, tokenizer: Any, template: str, *, patch: int, strategy: str
) -> Any:
    """Return LLaVA-NeXT's processor; see `mllm.export.stock.make_processor`."""
    patches = (tiling.side // patch) ** 2
    side = {"shortest_edge": tiling.side}
    square = {"height": tiling.side, "width": tiling.side}
    return LlavaNextProcessor(
        tiles_processor(
            model, "LlavaNextImageProcessorPil", size=side, crop_size=square, image_grid_pinpoints=pinpoints(tiling)
        ),
        tokenizer,
        patch_size=patch,
        vision_feature_select_strategy=strategy,
        num_additional_image_tokens=model.connector.num_tokens - patches + (strategy == "default"),
        image_token=IMAGE,
        chat_template=template,
    )


def onevision_processor(model: Model, tiling: AnyResolution, tokenizer: Any, template: str, *, strategy: str) -> Any:
    """Return LLaVA-OneVision's processor."""
    square = {"height": tiling.side, "width": tiling.side}
    return images_alone(LlavaOnevisionProcessor)(
        tiles_processor(model, "LlavaOnevisionImageProcessorPil", size=square, image_grid_pinpoints=pinpoints(tiling)),
        tokenizer,
        num_image_tokens=model.connector.num_tokens + (strategy == "default"),
        vision_feature_select_strategy=strategy,
        image_token=IMAGE,
        video_token=VIDEO,
        vision_aspect_ratio=f"anyres_max_{tiling.limit}",
        chat_template=template,
    )


def internvl_processor(model: Model, tiling: DynamicResolution, tokenizer: Any, template: str) -> Any:
    """Return InternVL's processor, which puts nothing around an image's tokens."""
    names = {"start_image_token": "", "end_image_token": "", "context_image_token": IMAGE, "video_token": VIDEO}
    tokenizer._set_model_specific_special_tokens(names)
    options = {"crop_to_patches": True, "min_patches": tiling.least, "max_patches": tiling.most}
    square = {"height": tiling.side, "width": tiling.side}
    return images_alone(InternVLProcessor)(
        tiles_processor(model, "GotOcr2ImageProcessorPil", size=square, **options),
        tokenizer,
        image_seq_length=model.connector.num_tokens,
        chat_template=template,
    )


def pinpoints(tiling: AnyResolution) -> list[list[int]]:
    """Return the sizes of the grids in pixels, height and width, as `transformers` names them."""
    return [[rows * tiling.side, columns * tiling.side] for rows, columns in tiling.choices]
