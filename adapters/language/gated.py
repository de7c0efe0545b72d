"""Gated cross-attention to images (Flamingo, arXiv:2204.14198, section 2.2): the language model looks aside."""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from mllm.errors import MLLMError
from mllm.lms.adapting import Switchable, decoder_layers
from mllm.lms.cross_attention import CrossAttentionMemory, current_memory


class Gated(Switchable):
    """Put a block that looks at images before every n-th layer of a decoder.

    An image takes one place in the sequence, a mark that is learnt; the connector's visual tokens stand beside it. A
    position looks at the last image before it, and where there is none nothing changes, to the bit.

    Args:
        model: a decoder of `transformers`; it is hooked, not changed.
        every: n; the first block is before the first layer.
        heads: of the cross-attention.
        head_dim: their width.
        ff: the feed-forward's width over the hidden size.

    Raises:
        MLLMError: an encoder-decoder model, or one whose layers are not found.
    """

    def __init__(self, model: Any, *, every: int = 4, heads: int = 8, head_dim: int = 64, ff: int = 4) -> None:
        super().__init__()
        if min(every, heads, head_dim, ff) < 1:
            raise MLLMError("adapters: gated takes every, heads, head_dim and ff from 1 on.")
        if model.config.is_encoder_decoder:
            raise MLLMError(
                "adapters: gated puts images beside a decoder's sequence, and this is an encoder-decoder model. Take "
                "another language model, or another adapter."
            )
        table = model.get_input_embeddings()
        with torch.no_grad():  # the mark starts as a token of the vocabulary
            mark = table(torch.randint(0, table.weight.shape[0], (1,)).to(table.weight.device))[0].float()
        self.mark = nn.Parameter(mark.clone())  # (D_lm,)
        dim = int(model.config.get_text_config().hidden_size)
        self.blocks = nn.ModuleList()
        for layer in list(decoder_layers(model))[::every]:
            block = Block(dim, len(mark), heads=heads, head_dim=head_dim, ff=ff).to(table.weight.device)
            self.blocks.append(block)
            self._put(block, layer)

    @property
    def tokens_per_image(self) -> int:
        """Return how many tokens of the sequence an image takes; 0 while the adapter is off: the connector's number."""
        return int(self.on)

    def _put(self, block: Block, layer: nn.Module) -> None:
        """Hook a block before a layer."""

        def look(module: nn.Module, args: Any, kwargs: Any) -> Any:
            memory = current_memory()
            if memory is None or not self.on:
                return None
            if args:
                return (block(args[0], memory), *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": block(kwargs["hidden_states"], memory)}

        layer.register_forward_pre_hook(look, with_kwargs=True)


class Block(nn.Module):
    """Cross-attention and a feed-forward, each behind a gate that starts closed: ``x + tanh(gate) * f(x)``.

    Args:
        dim: the hidden size.
        visual_dim: D_lm, the width of visual tokens.
        heads: of the attention.
        head_dim: their width.
        ff: the feed-forward's width over ``dim``.
    """

    def __init__(self, dim: int, visual_dim: int, *, heads: int, head_dim: int, ff: int) -> None:
        super().__init__()
        inner = heads * head_dim
        self.heads = heads
        self.norm = nn.LayerNorm(dim)
        self.visual_norm = nn.LayerNorm(visual_dim)  # connectors' outputs are of the embeddings' scale, often small
        self.query = nn.Linear(dim, inner, bias=False)
        self.key_value = nn.Linear(visual_dim, 2 * inner, bias=False)
        self.out = nn.Linear(inner, dim, bias=False)
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(dim), nn.Linear(dim, ff * dim, bias=False), nn.GELU(), nn.Linear(ff * dim, dim, bias=False)
        )
        self.attention_gate = nn.Parameter(torch.zeros(1))
        self.feed_forward_gate = nn.Parameter(torch.zeros(1))

    def forward(self, states: Tensor, memory: CrossAttentionMemory) -> Tensor:
        """Return states ``(B, n, D)``; those of positions that look at nothing are the very same."""
        numbers = memory.numbers_for(states)  # (B, n)
        x = states.to(self.query.weight.dtype)
        x = x + self.attention_gate.tanh() * self.attend(x, numbers, memory)
        x = x + self.feed_forward_gate.tanh() * self.feed_forward(x)
        return torch.where((numbers > 0).unsqueeze(-1), x.to(states.dtype), states)

    def attend(self, x: Tensor, numbers: Tensor, memory: CrossAttentionMemory) -> Tensor:
        """Return what each position finds at the image it looks at, ``(B, n, D)``."""
        key, value = self._key_value(memory, len(x))
        query = rearrange(self.query(self.norm(x)), "b n (h d) -> b h n d", h=self.heads)
        images, tokens = memory.visual.shape[1:3]
        shown = numbers.unsqueeze(-1) == torch.arange(1, images + 1, device=x.device)  # (B, n, N)
        shown = shown | (numbers == 0).unsqueeze(-1)  # a softmax needs something; it is not used
        mask = shown.repeat_interleave(tokens, dim=-1).unsqueeze(1)  # (B, 1, n, N Q)
        found = scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return self.out(rearrange(found, "b h n d -> b n (h d)"))

    def _key_value(self, memory: CrossAttentionMemory, rows: int) -> tuple[Tensor, Tensor]:
        """Return keys and values ``(rows, h, N Q, d)``; while decoding they are made once."""
        pair = memory.projections.get(self)
        if pair is None:
            visual = self.visual_norm(memory.visual.to(self.query.weight.dtype))
            both = rearrange(self.key_value(visual), "b i q (two h d) -> two b h (i q) d", two=2, h=self.heads)
            pair = both[0], both[1]
            if not torch.is_grad_enabled():
                memory.projections[self] = pair
        repeats = rows // len(memory.visual)
        return tuple(part.repeat_interleave(repeats, dim=0) if repeats > 1 else part for part in pair)
