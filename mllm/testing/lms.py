"""Build tiny language models with random weights, one for each model family, for the tests and the matrix in docs/."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    PreTrainedTokenizerFast,
)
from transformers.pytorch_utils import Conv1D

from mllm.devices import forked_rng

END, PAD, START = ("<|end|>", "<|pad|>", "<|start|>")


@dataclass(frozen=True)
class LMFamily:
    """The configuration of a tiny model of one family; called with a folder, it saves model and tokenizer there.

    Args:
        kind: ``model_type`` of the configuration.
        config: arguments of the configuration class.
        start: whether the tokenizer prepends a BOS token.
        pad: whether the tokenizer has a padding token.
        end: whether the tokenizer appends an EOS token, as those of encoder-decoder models do.
    """

    kind: str
    config: dict[str, Any] = field(default_factory=dict)
    start: bool = False
    pad: bool = True
    end: bool = False

    def __call__(self, folder: Path, *, seed: int = 0) -> str:
        """Save a model with random weights and its tokenizer, and return the folder."""
        tokenizer = tiny_tokenizer(start=self.start, pad=self.pad, end=self.end)
        config = AutoConfig.for_model(
            self.kind,
            vocab_size=len(tokenizer),
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=tokenizer.bos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            **self.config,
        )
        auto: Any = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        with forked_rng(seed):
            model = auto.from_config(config, trust_remote_code=False)
            spread(model)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return str(folder)


@torch.no_grad()
def spread(model: torch.nn.Module, std: float = 0.2) -> None:
    """Reinitialize all matrices with a standard deviation large enough that different inputs give different logits."""
    for module in model.modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Embedding | Conv1D):
            torch.nn.init.normal_(module.weight, std=std)


def tiny_tokenizer(*, start: bool = False, pad: bool = True, end: bool = False) -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token per byte and an EOS token.

    Args:
        start: whether it prepends a BOS token.
        pad: whether it has a padding token.
        end: whether it appends the EOS token.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = [END, *([PAD] if pad else []), *([START] if start else [])]
    vocabulary = {token: index for index, token in enumerate((*alphabet, *special))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if start or end:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=" ".join([*([START] if start else []), "$A", *([END] if end else [])]),
            special_tokens=[(token, vocabulary[token]) for token in special],
        )
    named = {"eos_token": END, **({"pad_token": PAD} if pad else {}), **({"bos_token": START} if start else {})}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named)


_LAYERS: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
}
_GROUPED = {**_LAYERS, "num_key_value_heads": 2}  # fewer key-value heads than heads
_GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}
_GEMMA = {**_GROUPED, "head_dim": 8}
_T5 = {"d_model": 32, "num_layers": 2, "num_heads": 4, "d_kv": 8, "d_ff": 64, "decoder_start_token_id": 257}
_BART = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": 256,
    "decoder_start_token_id": 256,
    "forced_eos_token_id": None,
}

# The builder of each family: it saves a tiny model in a folder, and returns the folder.
LM_FAMILIES: dict[str, Callable[[Path], str]] = {
    "gpt2": LMFamily("gpt2", _GPT, pad=False),
    "gpt-neo": LMFamily(
        "gpt_neo",
        {
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 4,
            "max_position_embeddings": 256,
            "attention_types": [[["global", "local"], 1]],
            "window_size": 8,
        },
        pad=False,
    ),
    "gpt-j": LMFamily("gptj", {**_GPT, "rotary_dim": 4}, pad=False),
    "gpt-neox": LMFamily("gpt_neox", _LAYERS),
    "opt": LMFamily(
        "opt",
        {
            "hidden_size": 32,
            "ffn_dim": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 256,
            "word_embed_proj_dim": 24,  # the embeddings' own width, as in OPT-350M
            "do_layer_norm_before": False,
        },
        start=True,
    ),
    "bloom": LMFamily("bloom", {"hidden_size": 32, "n_layer": 2, "n_head": 4}, start=True),
    "falcon": LMFamily("falcon", {key: value for key, value in _LAYERS.items() if key != "intermediate_size"}),
    "mpt": LMFamily("mpt", {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 256}),
    "llama": LMFamily("llama", _GROUPED, start=True, pad=False),
    "mistral": LMFamily("mistral", {**_GROUPED, "sliding_window": 8}, start=True),
    "mixtral": LMFamily("mixtral", {**_GROUPED, "num_local_experts": 4, "initializer_range": 0.2}, start=True),
    "qwen2": LMFamily("qwen2", _GROUPED),
    "qwen3": LMFamily("qwen3", _GEMMA),
    "gemma": LMFamily("gemma", _GEMMA, start=True),
    "gemma2": LMFamily("gemma2", {**_GEMMA, "sliding_window": 8, "query_pre_attn_scalar": 8}, start=True),
    "gemma3": LMFamily(
        "gemma3_text",
        {
            **_GEMMA,
            "sliding_window": 8,
            "query_pre_attn_scalar": 8,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        start=True,
    ),
    "phi": LMFamily("phi", _LAYERS),
    "phi3": LMFamily("phi3", _GROUPED),
    "olmo2": LMFamily("olmo2", _GROUPED),
    "stablelm": LMFamily("stablelm", _GROUPED),
    "granite": LMFamily("granite", {**_GROUPED, "embedding_multiplier": 3.0, "logits_scaling": 2.0}),
    "cohere": LMFamily("cohere", {**_GROUPED, "logit_scale": 1.0}, start=True),
    "smollm3": LMFamily("smollm3", {**_GROUPED, "no_rope_layer_interval": 2}),
    "mamba": LMFamily("mamba", {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}),
    "rwkv": LMFamily(
        "rwkv",
        {"hidden_size": 32, "attention_hidden_size": 32, "num_hidden_layers": 2, "context_length": 256},
    ),
    "t5": LMFamily("t5", _T5, end=True),
    "mt5": LMFamily("mt5", {**_T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}, end=True),
    "umt5": LMFamily("umt5", _T5, end=True),
    "bart": LMFamily("bart", _BART, start=True, end=True),
}
