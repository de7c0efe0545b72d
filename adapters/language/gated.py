"""Add gated cross-attention to images to a language model (Flamingo, arXiv:2204.14198, section 2.2)."""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from mllm.errors import MLLMError
from mllm.lms.adapting import Switchable, decoder_layers
from mllm.lms.cross_attention import CrossAttentionMemory, current_memory
from mllm.registry import Count


class Gated(Switchable):
    """Insert a gated cross-attention block before every n-th layer of a decoder.

    An image is one token of the sequence, with a learned embedding (``mark``); the connector's visual tokens are not
    part of the sequence. A position attends to the last image before it; where there is none, its state is bit for bit
    unchanged.

    Args:
        model: a decoder of `transformers`; it gets hooks, and its modules do not change.
        every: n; the first block is before the first layer.
        heads: cross-attention heads.
        head_dim: width of a head.
        ff: the feed-forward layer's width, as a multiple of the hidden size.

    Raises:
        MLLMError: an option below 1, an encoder-decoder model, or one whose layers are not found.
    """

    def __init__(self, model: Any, *, every: Count = 4, heads: Count = 8, head_dim: Count = 64, ff: Count = 4) -> None:
        super().__init__()
        if min(every, heads, head_dim, ff) < 1:
            raise MLLMError(
                f"adapters: gated has every {every}, heads {heads}, head_dim {head_dim}, ff {ff}: expected 1 or more "
                "of each. Raise the one below 1."
            )
        if model.config.is_encoder_decoder:
            raise MLLMError(
                "adapters: gated needs a decoder-only language model, and this is an encoder-decoder model. Use "
                "another language model, or another adapter."
            )
        table = model.get_input_embeddings()
        with torch.no_grad():  # the mark starts as the embedding of a random token
            mark = table(torch.randint(0, table.weight.shape[0], (1,)).to(table.weight.device))[0].float()
        self.mark = nn.Parameter(mark.clone())  # (D_lm,)
        dim = int(model.config.get_text_config().hidden_size)
        self.blocks = nn.ModuleList()
        for layer in list(decoder_layers(model))[::every]:
            block = Block(dim, len(mark), heads=heads, head_dim=head_dim, ff=ff).to(table.weight.device)
            self.blocks.append(block)
            self._hook(block, layer)

    @property
    def tokens_per_image(self) -> int:
        """Return the tokens of the sequence per image; 0 while the adapter is off: the connector's number."""
        return int(self.on)

    def _hook(self, block: Block, layer: nn.Module) -> None:
        """Hook a block before a layer."""

        def attend_first(module: nn.Module, args: Any, kwargs: Any) -> Any:
            memory = current_memory()
            if memory is None or not self.on:
                return None
            if args:
                return (block(args[0], memory), *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": block(kwargs["hidden_states"], memory)}

        layer.register_forward_pre_hook(attend_first, with_kwargs=True)


class Block(nn.Module):
    """Cross-attention and a feed-forward layer, each with a gate that starts at 0: ``x + tanh(gate) * f(x)``.

    Args:
        dim: the hidden size.
        visual_dim: D_lm, the width of visual tokens.
        heads: attention heads.
        head_dim: width of a head.
        ff: the feed-forward layer's width, as a multiple of ``dim``.
    """

    def __init__(self, dim: int, visual_dim: int, *, heads: Count, head_dim: Count, ff: Count) -> None:
        super().__init__()
        inner = heads * head_dim
        self.heads = heads
        self.norm = nn.LayerNorm(dim)
        self.visual_norm = nn.LayerNorm(
            visual_dim
        )  # a connector's output has the embeddings' scale, which is often small
        self.query = nn.Linear(dim, inner, bias=False)
        self.key_value = nn.Linear(visual_dim, 2 * inner, bias=False)
        self.out = nn.Linear(inner, dim, bias=False)
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(dim), nn.Linear(dim, ff * dim, bias=False), nn.GELU(), nn.Linear(ff * dim, dim, bias=False)
        )
        self.attention_gate = nn.Parameter(torch.zeros(1))
        self.feed_forward_gate = nn.Parameter(torch.zeros(1))

    def forward(self, states: Tensor, memory: CrossAttentionMemory) -> Tensor:
        """Return states ``(B, n, D)``; those of positions without an image are unchanged."""
        numbers = memory.numbers_for(states)  # (B, n)
        x = states.to(self.query.weight.dtype)
        x = x + self.attention_gate.tanh() * self.attend(x, numbers, memory)
        x = x + self.feed_forward_gate.tanh() * self.feed_forward(x)
        return torch.where((numbers > 0).unsqueeze(-1), x.to(states.dtype), states)

    def attend(self, x: Tensor, numbers: Tensor, memory: CrossAttentionMemory) -> Tensor:
        """Return the cross-attention output ``(B, n, D)`` of each position for its image."""
        key, value = self._keys_values(memory, len(x))
        query = rearrange(self.query(self.norm(x)), "b n (h d) -> b h n d", h=self.heads)
        images, tokens = memory.visual.shape[1:3]
        visible = numbers.unsqueeze(-1) == torch.arange(1, images + 1, device=x.device)  # (B, n, N)
        visible = visible | (numbers == 0).unsqueeze(-1)  # avoids an empty softmax, whose output is not used
        mask = visible.repeat_interleave(tokens, dim=-1).unsqueeze(1)  # (B, 1, n, N Q)
        attended = scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return self.out(rearrange(attended, "b h n d -> b n (h d)"))

    def _keys_values(self, memory: CrossAttentionMemory, rows: int) -> tuple[Tensor, Tensor]:
        """Return keys and values ``(rows, h, N Q, d)``; they are computed once while decoding."""
        pair = memory.projections.get(self)
        if pair is None:
            visual = self.visual_norm(memory.visual.to(self.query.weight.dtype))
            both = rearrange(self.key_value(visual), "b i q (two h d) -> two b h (i q) d", two=2, h=self.heads)
            pair = both[0], both[1]
            if not torch.is_grad_enabled():
                memory.projections[self] = pair
        repeats = rows // len(memory.visual)
        return tuple(part.repeat_interleave(repeats, dim=0) if repeats > 1 else part for part in pair)
