"""The loss at target positions: the language model's body for all positions, its vocabulary for targets only.

Notable: logits come from hidden states through the model's own forward, its body replaced by what it returned before.
So soft-capping, scaling, and whatever is hooked onto the head stay right, and no family is known by name.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

LOGITS = 2**25  # that exist at once: 128 MiB in float32


def read(model: Any, **inputs: Any) -> Any:
    """Return what a causal model's body makes of its inputs; ``last_hidden_state (B, T, D_lm)`` is for its head."""
    found: list[Any] = []

    def taken(_: nn.Module, __: Any, output: Any) -> Any:
        found.append(output)
        few = output.last_hidden_state[:1, :1].detach().contiguous()  # a view would have the whole vocabulary copied
        return type(output)(last_hidden_state=few)

    handle = model.get_decoder().register_forward_hook(taken)
    try:
        model(**inputs)
    finally:
        handle.remove()
    return found[0]


def project(model: Any, hidden: Tensor, kind: type) -> Tensor:
    """Return logits ``(N, V)`` of hidden states ``(N, D_lm)``, as the model's own forward makes them.

    ``kind`` is the class of what the body returns.
    """
    with _returning(model.get_decoder(), kind(last_hidden_state=hidden[None])):
        return model(inputs_embeds=hidden[None]).logits[0]


def separable(model: Any) -> bool:
    """Whether a model is a body and, position by position, a head: tried on a short sequence."""
    if model.get_decoder() is model:
        return False
    table = model.get_input_embeddings()
    with torch.no_grad(), still(model):
        embeds = table(torch.arange(4, device=table.weight.device)[None])
        expected = model(inputs_embeds=embeds).logits[0].float()
        try:
            output = read(model, inputs_embeds=embeds)
            found = project(model, output.last_hidden_state[0], type(output)).float()
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
            return False  # its forward does more with its body than hand on what that returns
    return found.shape == expected.shape and bool((found - expected).abs().max() <= 1e-3 * expected.abs().max())


def losses(model: Any, hidden: Tensor, wanted: Tensor, kind: type, *, logits: int = LOGITS) -> Tensor:
    """Return the negative log-likelihood ``(N,)`` of the tokens ``wanted (N,)`` that follow ``hidden (N, D_lm)``.

    ``kind`` is as for `project`; ``logits`` is how many exist at once, at most. Where that takes several chunks,
    backward makes each chunk's again.
    """

    def chunk_losses(states: Tensor, ids: Tensor) -> Tensor:
        return cross_entropy(project(model, states, kind).float(), ids, reduction="none")

    size = max(1, logits // model.get_output_embeddings().weight.shape[0])
    if len(wanted) <= size:
        return chunk_losses(hidden, wanted)
    chunks = zip(hidden.split(size), wanted.split(size), strict=True)
    return torch.cat([checkpoint(chunk_losses, *chunk, use_reentrant=False) for chunk in chunks])


@contextlib.contextmanager
def still(model: nn.Module) -> Iterator[None]:
    """Keep dropout out of a probe: two passes would differ, and draw random numbers that training counts on."""
    drawing = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in drawing:
            module.training = True


@contextlib.contextmanager
def _returning(body: nn.Module, output: Any) -> Iterator[None]:
    """Let a body return this, whatever it is given."""
    own = vars(body).get("forward")  # one that was put there (accelerate's hooks do)
    vars(body)["forward"] = lambda *_, **__: output
    try:
        yield
    finally:
        if own is None:
            del vars(body)["forward"]
        else:
            vars(body)["forward"] = own


def lexicon(lm: Any) -> list[tuple[int, str]]:
    """Return the tokens that are words or parts of words, with their strings."""
    texts = ((token, lm.decode([token]).strip()) for token in range(len(lm.tokenizer)))
    return [(token, text) for token, text in texts if text.isprintable() and any(map(str.isalpha, text))]
