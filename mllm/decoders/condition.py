"""Compare the condition that heads make with the one that an image decoder takes."""

from __future__ import annotations

from mllm.capabilities import ConditionHead
from mllm.config.parts import AssemblySpec
from mllm.errors import MLLMError
from mllm.readout.tokens import heads_on_meta
from mllm.registry import lookup, made


def check_condition(spec: AssemblySpec) -> None:
    """Compare the shape of the heads' conditions with that of the image decoder's; nothing is loaded.

    Raises:
        MLLMError: the shapes differ, or the decoder's files are missing.
    """
    if spec.decoder is None:
        return
    label = f"image decoder {spec.decoder.type}"
    expected = made(lookup("image_decoders", spec.decoder.type).shape, label, **spec.decoder.options())
    for name, head in heads_on_meta(spec.heads).items():
        if isinstance(head, ConditionHead) and head.condition != expected:
            raise MLLMError(
                f"The head {name} makes conditions of {head.condition[0]} x {head.condition[1]}, and the image decoder "
                f"takes {expected[0]} x {expected[1]}. Set the head's length and width to that, or use another decoder."
            )
