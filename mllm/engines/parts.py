"""Say which parts of a model an engine cannot run, by what the parts are; asked before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterator

from mllm.capabilities import CachePrefix, PeftAdapter, PrefixAdapter
from mllm.errors import MLLMError
from mllm.model import Model


def check_parts(model: Model) -> None:
    """Refuse a model that an engine cannot run.

    Args:
        model: the model; the meta device is enough.

    Raises:
        MLLMError: every part that needs the language model's layers here, by name.
    """
    if problems := list(_problems(model)):
        raise MLLMError(f"An engine cannot run this model: {'; '.join(problems)}. Use engine: transformers.")


def _problems(model: Model) -> Iterator[str]:
    spec = model.spec
    if not model.generates_text:
        yield "it has no language model that generates text"
        return
    if spec.lm.type != "transformers":
        yield f"its language model is of the type {spec.lm.type}, whose layers an engine does not have"
        return
    options = spec.lm.options()
    if options.get("init", "pretrained") != "pretrained":
        yield "its language model has random weights (lm.init), which are in no file"
    if options.get("quantize"):
        yield f"its language model is quantized when it is loaded (lm.quantize: {options['quantize']['kind']})"
    if model.lm.model.config.is_encoder_decoder:
        yield "its language model is an encoder-decoder, whose prompts are no sequence of one decoder"
    if trained := [path for path in spec.trained if path.partition(".")[0] == "lm"]:
        yield f"weights of its language model were trained ({', '.join(trained)})"
    yield from _adapters(model)
    if model.tokens is not None:
        names = ", ".join(model.tokens.names)
        yield f"it has new tokens with rows of their own, which heads read ({names})"


def _adapters(model: Model) -> Iterator[str]:
    """Yield the adapters that are neither embeddings before the prompt nor files of peft."""
    named = list(zip([part.type for part in model.spec.adapters], model.adapters, strict=True))
    for name, adapter in named:
        if isinstance(adapter, CachePrefix):
            yield f"the adapter {name} is keys and values in every layer, and no embeddings"
        elif isinstance(adapter, PeftAdapter):
            if getattr(adapter.peft_config, "use_dora", False):
                yield f"the adapter {name} learns magnitudes of weights (dora: true), which vLLM does not load"
        elif not isinstance(adapter, PrefixAdapter):
            yield f"the adapter {name} computes inside the language model's layers"
    if len(files := [name for name, adapter in named if isinstance(adapter, PeftAdapter)]) > 1:
        yield f"it has several adapters of peft ({', '.join(files)}), of which a request can have one"
