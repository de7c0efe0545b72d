"""Train an encoder's blocks by their depth: learning rates that fall towards its input, and stochastic depth.

A block is a module with an attention and an MLP, each of which is added to its input: so in the vision transformers of
transformers, timm and open_clip.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from mllm.errors import MLLMError

ATTENTION = ("self_attn", "attn", "attention", "self_attention")
MLP = ("mlp", "ffn", "feed_forward")
Groups = list[dict[str, Any]]


def blocks_of(encoder: nn.Module) -> list[nn.Module]:
    """Return an encoder's blocks, the first first.

    Raises:
        MLLMError: it has none, as a convolutional network.
    """
    blocks = [module for module in encoder.modules() if len(_branches(module)) == 2]
    if not blocks:
        raise MLLMError(
            "optim.layer_decay and optim.drop_path are for an encoder of blocks with attention and an MLP, and this "
            "one has none. Leave them out."
        )
    return blocks


def by_depth(groups: Groups, encoder: nn.Module, decay: float) -> Groups:
    """Return groups whose learning rates fall by a factor from each of the encoder's blocks to the one before.

    Of L blocks, block number l has the learning rate times ``decay ** (L + 1 - l)``. The modules in front of the first
    block, such as the patch embedding, count as number 0, those behind the last as number L (as in BEiT's and LAVIS's
    code).

    Args:
        groups: of the optimizer, each with its learning rate ``lr``.
        encoder: what it does not contain keeps its learning rate.
        decay: the factor, up to 1.
    """
    if next(encoder.parameters(), None) is None:  # planned without its files
        return groups
    numbers, divided = _numbers(encoder), []
    last = max(numbers.values())
    for group in groups:
        by_number: dict[int | None, list[nn.Parameter]] = {}
        for parameter in group["params"]:
            by_number.setdefault(numbers.get(id(parameter)), []).append(parameter)
        from_the_last = sorted(by_number.items(), key=lambda each: -(last + 1 if each[0] is None else each[0]))
        for number, parameters in from_the_last:
            share = 1.0 if number is None else decay ** (last + 1 - number)
            divided.append({**group, "params": parameters, "lr": group["lr"] * share})
    return divided


def _numbers(encoder: nn.Module) -> dict[int, int]:
    """Return the number of each parameter's block, by the parameter's id."""
    blocks = blocks_of(encoder)
    inside = {id(p): number for number, block in enumerate(blocks, start=1) for p in block.parameters()}
    numbers: dict[int, int] = {}
    current = 0
    for parameter in encoder.parameters():
        if id(parameter) in inside:
            current = len(blocks)
        numbers[id(parameter)] = inside.get(id(parameter), current)
    return numbers


def drop_paths(encoder: Any, rate: float, device: torch.device) -> list[RemovableHandle]:
    """Let an encoder drop its branches at random in training: stochastic depth (arXiv:1603.09382).

    Each image loses a block's attention, or its MLP, with a probability that grows linearly from 0 at the first block
    to ``rate`` at the last; where it keeps it, the branch is divided by the probability of that.

    Args:
        encoder: it gets hooks. It encodes two blank images, to see that its branches are all that is added to a
            block's input.
        rate: of the last block.
        device: of the encoder.

    Returns:
        The hooks, which remove it.

    Raises:
        MLLMError: the encoder has no blocks, or they add up otherwise.
    """
    blocks = blocks_of(encoder)
    _check_residual(blocks, encoder, torch.zeros(2, *encoder.shape, device=device))
    rates = torch.linspace(0, rate, len(blocks), device="cpu").tolist()
    return [
        branch.register_forward_hook(partial(_dropped, rate=share))
        for block, share in zip(blocks, rates, strict=True)
        for branch in _branches(block)
        if share
    ]


def _dropped(module: nn.Module, _inputs: Any, output: Any, *, rate: float) -> Any:
    if not module.training:
        return output
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    drawn = torch.rand(len(hidden), *[1] * (hidden.dim() - 1), dtype=hidden.dtype, device=hidden.device)
    hidden = hidden.div(1 - rate) * (drawn + (1 - rate)).floor()
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


def _branches(block: nn.Module) -> list[nn.Module]:
    """Return a block's attention and MLP, as far as it has them."""
    children = dict(block.named_children())
    named = [next((children[name] for name in names if name in children), None) for names in (ATTENTION, MLP)]
    return [branch for branch in named if branch is not None]


@torch.no_grad()
def _check_residual(blocks: Sequence[nn.Module], encoder: Any, pixels: Tensor) -> None:
    """Refuse blocks that without their branches do not return their input, image by image."""
    unchanged: list[bool] = []
    images = len(pixels.flatten(0, -4))  # a video's frames are images

    def compare(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        before = args[0] if args else kwargs["hidden_states"]
        after = output[0] if isinstance(output, tuple) else output
        unchanged.append(len(after) == images and after.shape == before.shape and torch.equal(after, before))

    hooks = [branch.register_forward_hook(_zeros) for block in blocks for branch in _branches(block)]
    hooks += [block.register_forward_hook(compare, with_kwargs=True) for block in blocks]
    try:
        encoder(pixels)
    finally:
        for hook in hooks:
            hook.remove()
    if not all(unchanged):
        raise MLLMError(
            "optim.drop_path drops the attention and the MLP of an encoder's blocks, and in this encoder these are not "
            "all that is added to a block's input. Leave it out."
        )


def _zeros(_: nn.Module, __: Any, output: Any) -> Any:
    if isinstance(output, tuple):
        return (torch.zeros_like(output[0]), *output[1:])
    return torch.zeros_like(output)
