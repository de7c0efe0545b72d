"""Map features to learned queries by cross-attention: BLIP-2's Q-Former (arXiv:2301.12597)."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, Literal

import torch
from einops import repeat
from mllm.adapters.connectors.qformer_text import Mode, Words, joint_mask
from mllm.adapters.connectors.reduce import projection
from torch import Tensor, nn
from transformers import AutoModel, Blip2QFormerConfig, Blip2QFormerModel

from mllm.errors import MLLMError
from mllm.hub import loading as hub
from mllm.registry import Count, Dropout
from mllm.slots import Connector


class QFormer(Connector):
    """Features ``(B, P, D_vis)`` to Q visual tokens, by `transformers`' Q-Former.

    Args:
        vis_dim: D_vis.
        lm_dim: D_lm; None: there is no language model, and no projection to it.
        num_patches: P.
        grid: not used.
        tokens: Q, the number of queries.
        dim: hidden size.
        layers: number of blocks; the first, third, ... cross-attend to the features.
        heads: attention heads.
        ffn: width of the feed-forward layers; None: 4 x dim.
        init: a part, folder or hub id of a BERT that initializes the blocks, of the same ``dim``, ``layers``, ``heads``
            and ``ffn``; None: random weights.
        norm: add a LayerNorm on the features; false where the encoder's output is normalized already.
        words: a part, folder or hub id of a tokenizer: the transformer reads text too (`joint`); None: images only.
        questions: the visual tokens depend on the image's question, which the transformer reads beside the queries
            (InstructBLIP, arXiv:2305.06500); it needs ``words``.
        causal: a query attends only to itself and earlier queries (SEED's tokenizer, arXiv:2307.08041).
        dropout: in the transformer.

    Attributes:
        num_tokens: Q.
        project: the linear layer to the language model's width.

    Raises:
        MLLMError: ``init`` is not a BERT of these sizes, or there are ``questions`` without ``words``.
    """

    reads_whole = True

    def __init__(
        self,
        *,
        vis_dim: int,
        lm_dim: int | None,
        num_patches: int,
        grid: tuple[int, int] | None,
        tokens: Count = 32,
        dim: Count = 768,
        layers: Count = 12,
        heads: Count = 12,
        ffn: Count | None = None,
        init: str | None = None,
        norm: bool = True,
        words: str | None = None,
        questions: bool = False,
        causal: bool = False,
        dropout: Dropout = 0.0,
    ) -> None:
        super().__init__()
        if questions and (words is None or causal):
            raise MLLMError(
                "connector.questions needs a tokenizer, and queries that all attend to a text: set connector.words to "
                "that of a BERT, and leave out connector.causal."
            )
        config = Blip2QFormerConfig(
            hidden_size=dim,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            intermediate_size=ffn or 4 * dim,
            encoder_hidden_size=vis_dim,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
            use_qformer_text_input=words is not None,
        )
        words_ = Words(hub.resolve(words, group="lms"), config) if words is not None else None
        self.words: nn.Module | None = words_
        self.num_tokens, self.causal = tokens, causal
        self.norm_features = nn.LayerNorm(vis_dim, eps=1e-6) if norm else nn.Identity()
        self.queries = nn.Parameter(torch.empty(1, tokens, dim).normal_(std=config.initializer_range))
        self.qformer = Blip2QFormerModel(config)
        if init is not None:
            _init_from_bert(self.qformer, words_, hub.resolve(init, group="lms"))
        self.project = projection(dim, lm_dim)

    def body(self, features: Tensor) -> Tensor:
        """Return the queries' states ``(B, Q, dim)`` after cross-attention to the features."""
        queries = repeat(self.queries, "1 q d -> b q d", b=len(features))
        mask = None
        if self.causal:
            size = (len(features), 1, self.num_tokens, self.num_tokens)
            mask = torch.ones(size, dtype=torch.bool, device=features.device).tril()
        states: Tensor = self.qformer(
            query_embeds=queries,
            attention_mask=mask,
            encoder_hidden_states=self.norm_features(self.cast(features)),
            encoder_attention_mask=self.mask_of(features),
        ).last_hidden_state
        return states

    def forward(self, features: Tensor) -> Tensor:
        """Return visual tokens ``(B, Q, D_lm)`` of features ``(B, P, D_vis)``."""
        return self.project(self.body(features))


class TextQFormer(QFormer):
    """A Q-Former that also reads texts (BLIP-2's first stage)."""

    words: Words

    def joint(self, features: Tensor, text_ids: Tensor, mask: Tensor, mode: Mode) -> tuple[Tensor, Tensor]:
        """Read features and texts in one transformer.

        Args:
            features: ``(B, P, D_vis)``.
            text_ids: ``(B, T)``.
            mask: of the texts, ``(B, T)``.
            mode: the attention mask, see `mllm.adapters.connectors.qformer_text.joint_mask`.

        Returns:
            The states of the queries ``(B, Q, dim)`` and of the text ``(B, T, dim)``.
        """
        queries = repeat(self.queries, "1 q d -> b q d", b=len(features))
        states = self.qformer(
            query_embeds=self.words.table(input_ids=text_ids, query_embeds=queries),
            query_length=self.num_tokens,
            attention_mask=joint_mask(self.num_tokens, mask, mode),
            encoder_hidden_states=self.norm_features(self.cast(features)),
            encoder_attention_mask=self.mask_of(features),
        ).last_hidden_state
        return states[:, : self.num_tokens], states[:, self.num_tokens :]

    def read(self, text_ids: Tensor, mask: Tensor) -> Tensor:
        """Return the states ``(B, T, dim)`` of texts ``(B, T)``, without queries and features."""
        states: Tensor = self.qformer(
            query_embeds=self.words.table(input_ids=text_ids), query_length=0, attention_mask=mask
        ).last_hidden_state
        return states


class QuestionQFormer(TextQFormer):
    """A Q-Former whose queries read the question of their image (InstructBLIP)."""

    reads_questions: Literal[True] = True

    def body(self, features: Tensor, questions: Sequence[str] | None = None) -> Tensor:
        """Return the queries' states ``(B, Q, dim)`` after cross-attention to the features.

        Args:
            features: ``(B, P, D_vis)``.
            questions: B texts, to which the queries attend; None: they read the images alone.
        """
        if questions is None:
            return super().body(features)
        ids, mask = self.words.tokenize_ends(questions)
        return self.joint(features, ids, mask, "matching")[0]

    def forward(self, features: Tensor, questions: Sequence[str] | None = None) -> Tensor:
        """Return visual tokens ``(B, Q, D_lm)`` of features ``(B, P, D_vis)`` and their questions."""
        return self.project(self.body(features, questions))


def qformer(*, words: str | None = None, questions: bool = False, **options: Any) -> QFormer:
    """Return the Q-Former that reads images, and texts (``words``) or ``questions``, of `QFormer`'s arguments."""
    kind = QuestionQFormer if questions else QFormer if words is None else TextQFormer
    return kind(words=words, questions=questions, **options)


qformer.__signature__ = inspect.signature(QFormer)  # type: ignore[attr-defined]


def _init_from_bert(qformer: nn.Module, words: Words | None, init: str) -> None:
    """Copy a BERT's blocks and embeddings; the cross-attention, which BERT lacks, keeps its random weights."""
    try:
        if hub.load_config(init).model_type != "bert":
            raise MLLMError(f"connector.init is {init!r}: expected a BERT. Give the id or folder of one.")
        bert = hub.load_model(AutoModel, init, add_pooling_layer=False).state_dict()
    except OSError as error:
        raise MLLMError(
            f"connector.init: {init!r} could not be loaded: {error}. Give the id or folder of a BERT."
        ) from None
    renamed = {}
    for name, tensor in bert.items():
        name = name.replace("attention.self.", "attention.attention.").replace("embeddings.LayerNorm", "layernorm")
        renamed[name] = tensor
        for part in ("intermediate", "output"):
            if f".{part}.dense" in name or f".{part}.LayerNorm" in name:
                renamed[_query_side(name, part)] = tensor
    expected = qformer.state_dict()
    shared = {name: tensor for name, tensor in renamed.items() if name in expected}
    missing = [name for name in expected if name not in shared and "crossattention" not in name]
    wrong = [name for name, tensor in shared.items() if expected[name].shape != tensor.shape]
    if missing or wrong:
        raise MLLMError(
            f"connector.init: {init!r} does not fit the Q-Former: missing or of another shape are "
            f"{', '.join((missing + wrong)[:4])}, ... Set connector.dim, layers, heads and ffn to the BERT's."
        )
    qformer.load_state_dict(shared, strict=False)
    if words is not None:
        _words_from_bert(words, bert, init)


@torch.no_grad()
def _words_from_bert(words: Words, bert: dict[str, Tensor], init: str) -> None:
    """Copy a BERT's word and position embeddings; the start token, which BERT lacks, keeps its random weights."""
    if len(bert["embeddings.word_embeddings.weight"]) != words.start:
        raise MLLMError(
            f"connector.words has a vocabulary of {words.start} tokens, and the BERT of connector.init, {init!r}, one "
            f"of {len(bert['embeddings.word_embeddings.weight'])}. Set connector.words to that BERT too."
        )
    table = words.table
    for name, module in (("word", table.word_embeddings), ("position", table.position_embeddings)):
        target, source = module.weight, bert[f"embeddings.{name}_embeddings.weight"]
        target[: len(source)] = source[: len(target)]


def _query_side(name: str, part: str) -> str:
    """Return the name, in the queries' feed-forward layer, of a tensor of the text's feed-forward layer."""
    head, _, tail = name.rpartition(f".{part}.")
    return name if head.endswith("attention") else f"{head}.{part}_query.{tail}"
