"""Join a frozen vision encoder and a frozen language model by a small trained connector.

Names are loaded when they are used, so ``import mllm`` costs nothing: torch comes with the first of them.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from mllm.version import __version__ as __version__

if TYPE_CHECKING:
    from mllm.assembling import assemble as assemble
    from mllm.assembly import Assembly as Assembly
    from mllm.build import load as load
    from mllm.errors import MLLMError as MLLMError
    from mllm.evaluation import evaluate as evaluate
    from mllm.evaluation import metric as metric
    from mllm.training.train import train as train

_PUBLIC = {
    "Assembly": "mllm.assembly",
    "MLLMError": "mllm.errors",
    "assemble": "mllm.assembling",
    "evaluate": "mllm.evaluation",
    "load": "mllm.build",
    "metric": "mllm.evaluation",
    "train": "mllm.training.train",
}
__all__ = ["Assembly", "MLLMError", "__version__", "assemble", "evaluate", "load", "metric", "train"]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'mllm' has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return __all__
