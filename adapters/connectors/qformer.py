"""The querying transformer of BLIP-2 (arXiv:2301.12597): learned queries that read the features by cross-attention."""

from __future__ import annotations

import torch
from einops import repeat
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, Blip2QFormerConfig, Blip2QFormerModel

from mllm.errors import MLLMError


class QFormer(nn.Module):
    """Features ``(B, P, D_vis)`` to Q visual tokens, by `transformers`' Q-Former.

    Args:
        vis_dim: D_vis.
        lm_dim: D_lm.
        num_patches: P.
        grid: not used: a sequence will do.
        tokens: Q, the queries.
        dim: width inside.
        layers: blocks; every second one attends to the features, from the first on.
        heads: of the attention.
        ffn: width of the feed-forward layers; None: 4 x dim.
        init: a folder or hub id of a BERT whose blocks it starts from, of the same ``dim``, ``layers``, ``heads`` and
            ``ffn``; None: random weights.
        norm: a LayerNorm on the features first; false where the encoder's output is normalised already.
        causal: a query sees only itself and those before it (SEED's tokenizer, arXiv:2307.08041).
        dropout: inside.

    Attributes:
        num_tokens: Q.
        project: the linear map to the language model's width.

    Raises:
        MLLMError: ``init`` is no BERT of these sizes.
    """

    def __init__(
        self,
        *,
        vis_dim: int,
        lm_dim: int,
        num_patches: int,
        grid: tuple[int, int] | None,
        tokens: int = 32,
        dim: int = 768,
        layers: int = 12,
        heads: int = 12,
        ffn: int | None = None,
        init: str | None = None,
        norm: bool = True,
        causal: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        config = Blip2QFormerConfig(
            hidden_size=dim,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            intermediate_size=ffn or 4 * dim,
            encoder_hidden_size=vis_dim,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
        )
        self.num_tokens, self.causal = tokens, causal
        self.norm_features = nn.LayerNorm(vis_dim, eps=1e-6) if norm else nn.Identity()
        self.queries = nn.Parameter(torch.empty(1, tokens, dim).normal_(std=config.initializer_range))
        self.qformer = Blip2QFormerModel(config)
        if init is not None:
            _start_from_bert(self.qformer, init)
        self.project = nn.Linear(dim, lm_dim)

    def body(self, features: Tensor) -> Tensor:
        """Return the queries after reading the features: ``(B, Q, dim)``."""
        queries = repeat(self.queries, "1 q d -> b q d", b=len(features))
        mask = None
        if self.causal:
            size = (len(features), 1, self.num_tokens, self.num_tokens)
            mask = torch.ones(size, dtype=torch.bool, device=features.device).tril()
        read: Tensor = self.qformer(
            query_embeds=queries, attention_mask=mask, encoder_hidden_states=self.norm_features(features)
        ).last_hidden_state
        return read

    def forward(self, features: Tensor) -> Tensor:
        """Return visual tokens ``(B, Q, D_lm)`` of features ``(B, P, D_vis)``."""
        return self.project(self.body(features))


def _start_from_bert(qformer: nn.Module, init: str) -> None:
    """Copy a BERT's blocks; cross-attention, which it has not, keeps its random weights."""
    try:
        if AutoConfig.from_pretrained(init).model_type != "bert":
            raise MLLMError(f"connector.init is {init!r}, which is no BERT.")
        bert = AutoModel.from_pretrained(init, add_pooling_layer=False).state_dict()
    except OSError as error:
        raise MLLMError(f"connector.init: {init!r} could not be loaded: {error}") from None
    renamed = {}
    for name, tensor in bert.items():
        name = name.replace("attention.self.", "attention.attention.").replace("embeddings.LayerNorm", "layernorm")
        renamed[name] = tensor
        for part in ("intermediate", "output"):
            if f".{part}.dense" in name or f".{part}.LayerNorm" in name:
                renamed[_query_side(name, part)] = tensor
    own = qformer.state_dict()
    fitting = {name: tensor for name, tensor in renamed.items() if name in own}
    missing = [name for name in own if name not in fitting and "crossattention" not in name]
    wrong = [name for name, tensor in fitting.items() if own[name].shape != tensor.shape]
    if missing or wrong:
        raise MLLMError(
            f"connector.init: {init!r} does not fit the Q-Former: {', '.join((missing + wrong)[:4])}, ... "
            "Set connector.dim, layers, heads and ffn to the BERT's."
        )
    qformer.load_state_dict(fitting, strict=False)


def _query_side(name: str, part: str) -> str:
    """Return where the queries' own feed-forward layer has what the text's has at ``name``."""
    head, _, tail = name.rpartition(f".{part}.")
    return name if head.endswith("attention") else f"{head}.{part}_query.{tail}"
