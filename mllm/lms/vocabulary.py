"""Compute the loss at target positions: the body runs on all positions, the output embeddings on targets only.

Notable: logits come from hidden states through the model's forward, whose body returns a stored output. So
soft-capping, scaling, and hooks of the head stay right, and no family is known by name.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

MAX_LOGITS = 2**25  # that exist at once: 128 MiB in float32
MAX_LOGITS_ON_GPU = 2**28


def run_body(model: Any, **inputs: Any) -> Any:
    """Return the output of a causal model's body; its ``last_hidden_state (B, T, D_lm)`` is the head's input."""
    outputs: list[Any] = []

    def capture(_: nn.Module, __: Any, output: Any) -> Any:
        outputs.append(output)
        few = output.last_hidden_state[:1, :1].detach().contiguous()  # a view would have the whole vocabulary copied
        return type(output)(last_hidden_state=few)

    handle = model.get_decoder().register_forward_hook(capture)
    try:
        model(**inputs)
    finally:
        handle.remove()
    return outputs[0]


def project(model: Any, hidden: Tensor, output_class: type) -> Tensor:
    """Return logits ``(N, V)`` of hidden states ``(N, D_lm)``, computed by the model's forward.

    ``output_class`` is the class of the body's output.
    """
    with _returning(model.get_decoder(), output_class(last_hidden_state=hidden[None])):
        return model(inputs_embeds=hidden[None]).logits[0]


def separable(model: Any) -> bool:
    """Whether a model is a body and, position by position, a head, by a probe of a short sequence."""
    if model.get_decoder() is model:
        return False
    table = model.get_input_embeddings()
    with torch.no_grad(), without_dropout(model):
        embeds = table(torch.arange(4, device=table.weight.device)[None])
        expected = model(inputs_embeds=embeds).logits[0].float()
        try:
            output = run_body(model, inputs_embeds=embeds)
            logits = project(model, output.last_hidden_state[0], type(output)).float()
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
            return False  # its forward does more with its body than pass the output on
    return logits.shape == expected.shape and bool((logits - expected).abs().max() <= 1e-3 * expected.abs().max())


def losses(
    model: Any,
    hidden: Tensor,
    targets: Tensor,
    output_class: type,
    *,
    smoothing: float = 0.0,
    max_logits: int | None = None,
) -> Tensor:
    """Return the negative log-likelihood ``(N,)`` of the tokens ``targets (N,)`` that follow ``hidden (N, D_lm)``.

    Args:
        model: a causal language model of `transformers`.
        hidden: the body's states.
        targets: ids.
        output_class: of the body, as for `project`.
        smoothing: label smoothing.
        max_logits: that exist at once; None: by the device. Several chunks are recomputed in backward, one by one.
    """

    def chunk_losses(states: Tensor, ids: Tensor) -> Tensor:
        logits = project(model, states, output_class).float()
        return cross_entropy(logits, ids, reduction="none", label_smoothing=smoothing)

    most = max_logits or (MAX_LOGITS_ON_GPU if hidden.device.type == "cuda" else MAX_LOGITS)
    size = max(1, most // model.get_output_embeddings().weight.shape[0])
    if len(targets) <= size:
        return chunk_losses(hidden, targets)
    chunks = zip(hidden.split(size), targets.split(size), strict=True)
    return torch.cat([checkpoint(chunk_losses, *chunk, use_reentrant=False) for chunk in chunks])


@contextlib.contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """Turn dropout off for a probe: two passes would differ, and use random numbers that training relies on."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextlib.contextmanager
def _returning(body: nn.Module, output: Any) -> Iterator[None]:
    """Let a body return a stored output, whatever its inputs."""
    patched = vars(body).get("forward")  # an instance's forward, as accelerate's hooks set it
    vars(body)["forward"] = lambda *_, **__: output
    try:
        yield
    finally:
        if patched is None:
            del vars(body)["forward"]
        else:
            vars(body)["forward"] = patched


def lexicon(lm: Any) -> list[tuple[int, str]]:
    """Return the ids of the tokens that are words or parts of words, with their texts."""
    texts = ((token, lm.decode([token]).strip()) for token in range(len(lm.tokenizer)))
    return [(token, text) for token, text in texts if text.isprintable() and any(map(str.isalpha, text))]
