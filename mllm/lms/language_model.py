"""The language model: any causal or encoder-decoder model of `transformers`, frozen, with embeddings as its input.

Notable: the model's forward is used throughout (scaled embeddings, position offsets, soft-capping, sliding windows), so
no family is known by name; the runner (`mllm.lms.runners`) depends on what the model can do. Logits are computed only
at the positions asked for.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer
from transformers.modeling_layers import GradientCheckpointingLayer

from mllm.hub import loading as hub
from mllm.hub.fingerprints import fingerprint, tensor_hash
from mllm.hub.identity import of_language_model
from mllm.lms import generation
from mllm.lms.cross_attention import EmbeddingsWithMemory
from mllm.lms.decoding import Decoding
from mllm.lms.prepared import frozen, loading_options
from mllm.lms.runners import probes
from mllm.lms.runners.base import Runner
from mllm.lms.runners.choose import choose_runner
from mllm.lms.runners.cross_attending import CrossAttendingRunner
from mllm.lms.runners.prefixed import PrefixedRunner
from mllm.lms.states import read_states
from mllm.lms.tokenizer import TextTokenizer


class LanguageModel(nn.Module):
    """A frozen language model and its tokenizer.

    Args:
        model: an installed part (``mllm/smollm2-135m``), a hub id or a folder.
        dtype: of the weights; ``auto``: as they are stored.
        quantize: by bitsandbytes (LLM.int8, arXiv:2208.07339; NF4, arXiv:2305.14314), as a recipe says.
        init: ``random`` keeps the architecture and initializes the weights at random (a control).
        seed: of the random weights.
        trust_remote_code: run Python code from the model's repository.
        device: on which quantized weights are built; others are loaded on the CPU.
        attn_implementation: of the attention, as `transformers` names it (``sdpa``, ``flash_attention_2``, ...).

    Attributes:
        model: the model of `transformers`.
        runner: how it is run.
        text: its tokenizer, with new tokens.
        dim: D_lm.
        context: the context length, or None where the model has no limit.
    """

    def __init__(
        self,
        *,
        model: str,
        dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
        quantize: Mapping[str, Any] | str | None = None,
        init: Literal["pretrained", "random"] = "pretrained",
        seed: int = 0,
        trust_remote_code: bool = False,
        device: torch.device | str = "cpu",
        attn_implementation: str | None = None,
    ) -> None:
        super().__init__()
        folder = hub.resolve(model, group="lms")
        code: Any = {"trust_remote_code": trust_remote_code}
        tokenizer = hub.load_processor(AutoTokenizer, folder, **code)
        options = loading_options(dtype, quantize, torch.device(device), attn_implementation)
        self._folder, self._init, self._code = folder, init, code
        self.model = frozen(self._load(folder, init=init, seed=seed, **options))
        self.text = TextTokenizer(tokenizer, self.model)
        self._prefix_length = 0  # of adapters
        self.runner = self._choose_runner()
        if init == "random" and self.model.device.type != "meta":
            _ = self.fingerprint  # before anything in it trains

    def _load(self, folder: str, **options: Any) -> Any:
        return hub.load_model(hub.language_class(folder, **self._code), folder, **self._code, **options)

    def _choose_runner(self) -> Runner:
        return choose_runner(self.model, self.text.end_of_text)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Return the fingerprint of weights, configuration, tokenizer and chat template."""
        weights = fingerprint(self._folder) if self._init == "pretrained" else tensor_hash(self.model)
        return of_language_model(weights, self._folder, self.tokenizer, **self._code)

    @property
    def dim(self) -> int:
        """Return D_lm, the width of the embeddings."""
        return int(self.model.get_input_embeddings().weight.shape[1])

    @property
    def context(self) -> int | None:
        """Return the context length, without adapters' positions, or None where the model has no limit."""
        config = self.model.config.get_text_config()
        names = ("max_position_embeddings", "n_positions", "max_seq_len")
        limit = next((getattr(config, name) for name in names if hasattr(config, name)), None)
        return None if limit is None else limit - self._prefix_length

    @property
    def tokenizer(self) -> Any:
        """Return the tokenizer of `transformers`."""
        return self.text.tokenizer

    @property
    def new_tokens(self) -> dict[str, int]:
        """Return name -> id of the tokens that were added."""
        return self.text.new_tokens

    @new_tokens.setter
    def new_tokens(self, tokens: dict[str, int]) -> None:
        self.text.new_tokens = tokens

    @property
    def bos(self) -> list[int]:
        """Return the ids that every sequence starts with."""
        return self.text.bos

    @property
    def eos(self) -> int:
        """Return the id that ends an answer."""
        return self.text.eos

    @property
    def pad(self) -> int:
        """Return the padding id."""
        return self.text.pad

    def tokenize(self, text: str, *, control: bool = False) -> list[int]:
        """Return the ids of a text without added special tokens; ``control``: control words in it are recognised."""
        return self.text.tokenize(text, control=control)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids, special tokens left out."""
        return self.text.decode(ids)

    def embed(self, ids: Tensor) -> Tensor:
        """Return embeddings ``(B, T, D_lm)`` of ids ``(B, T)``."""
        return self.model.get_input_embeddings()(ids)

    def embedding_scale(self) -> float:
        """Return the standard deviation of the embeddings: the scale at which a connector's output starts."""
        with torch.no_grad():
            ids = torch.arange(min(4096, self.model.get_input_embeddings().weight.shape[0]))
            return float(self.embed(ids.to(self.model.device)).float().std())

    @property
    def layers(self) -> list[nn.Module]:
        """Return the layers, as `transformers` marks them."""
        return [module for module in self.model.modules() if isinstance(module, GradientCheckpointingLayer)]

    @property
    def whole_batches(self) -> bool:
        """Whether a batch is one forward pass, whatever the lengths of its rows."""
        return self.runner.whole_batches

    def can_pack(self) -> bool:
        """Whether prompts that share a row have the logits that each has alone, by a probe, adapters included."""
        return probes.can_pack(self.runner)

    def prepend(self, adapter: Any) -> None:
        """Put an adapter's positions before every sequence; see `mllm.lms.runners.prefixed.PrefixedRunner`."""
        self.runner = PrefixedRunner(self.runner, adapter)
        self._prefix_length += adapter.num_positions

    def cross_attend(self) -> None:
        """Let blocks inside the layers attend to the visual tokens of a memory; see `mllm.lms.cross_attention`."""
        self.runner = CrossAttendingRunner(self.runner)

    def logits(
        self, embeds: Tensor | EmbeddingsWithMemory, mask: Tensor, keep: Tensor | None = None, cache: Any = None
    ) -> Tensor:
        """Return logits ``(B, K, V)`` at positions ``keep (K,)``; an encoder-decoder model's of the first token only.

        Args:
            embeds: the sequence; with a cache, what follows the cached part.
            mask: ``(B, T)``, 1 where there is a token; with a cache it covers the cached part too.
            keep: positions within T; None: all.
            cache: the KV cache of what precedes; it is extended.
        """
        return self.runner.logits(embeds, mask, keep, cache)

    def losses(
        self, embeds: Tensor | EmbeddingsWithMemory, mask: Tensor, labels: Tensor, *, smoothing: float = 0.0
    ) -> Tensor:
        """Return the negative log-likelihood ``(N,)`` of each target, row by row.

        Args:
            embeds: ``(B, T, D_lm)``.
            mask: ``(B, T)``, 1 where there is a token; or ``(B, T, T)``, see `mllm.prompts.batch.Batch`.
            labels: ``(B, T)``, the ids; `mllm.prompts.batch.IGNORED` where there is no target.
            smoothing: label smoothing: the share of a target that is spread over the vocabulary.
        """
        return self.runner.losses(embeds, mask, labels, smoothing=smoothing)

    def hidden(self, embeds: Tensor | EmbeddingsWithMemory, mask: Tensor) -> Tensor:
        """Return the last hidden states ``(B, T, D)``, the input of the output embeddings.

        Raises:
            MLLMError: an encoder-decoder model, which has no such states of a sequence.
        """
        return self.runner.hidden(embeds, mask)

    def read(
        self, embeds: Tensor, mask: Tensor, keep: Tensor, frozen_prefix: int = 0, num_logits: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the last hidden states ``(B, K, D)`` and the logits ``(B, K, V)`` at the positions ``keep (K,)``.

        Where the model allows it, one forward pass gives both.

        Args:
            embeds: ``(B, T, D_lm)``.
            mask: ``(B, T)``, 1 where there is a token.
            keep: positions, all of them after the frozen prefix.
            frozen_prefix: how many of the first positions need no gradient: no activations are stored for them.
            num_logits: at how many of the positions, from the first, logits are needed; None: all.

        Raises:
            MLLMError: an encoder-decoder model, which has no hidden states of a sequence.
        """
        return read_states(self, embeds, mask, keep, frozen_prefix, num_logits)

    @torch.no_grad()
    def prefill(self, embeds: Tensor | EmbeddingsWithMemory, mask: Tensor) -> tuple[Any, Tensor]:
        """Return the KV cache of sequences ``(B, T, D_lm)``, and the next token's logits ``(B, V)``."""
        return self.runner.prefill(embeds, mask)

    def fork(self, cache: Any, rows: Sequence[int] = (0,)) -> Any:
        """Return a copy of these rows of a KV cache, to be extended; the original stays as it is."""
        return self.runner.fork(cache, rows)

    def length(self, cache: Any) -> int:
        """Return the sequence length of a KV cache."""
        return self.runner.length(cache)

    @property
    def has_window(self) -> bool:
        """Whether a layer has a sliding window, which counts masked positions, too."""
        return self.runner.window is not None

    def exceeds_window(self, length: int) -> bool:
        """Whether a sequence is too long to have masked positions between others."""
        return self.runner.window is not None and length > self.runner.window

    def step(self, cache: Any, ids: Tensor, mask: Tensor, rows: Sequence[int] | None = None) -> Tensor:
        """Return logits ``(N, V)`` of the token after the first tokens ``ids (N, L)`` of answers.

        Args:
            cache: the KV cache of the prompts and of the first L - 1 tokens; it is extended.
            ids: the answers' first tokens.
            mask: ``(N or 1, T)`` of the prompts.
            rows: the row of the cache that each answer continues; None: the row of its number.
        """
        return self.runner.step(cache, ids, mask, rows)

    def generate(
        self,
        mask: Tensor,
        decodings: Sequence[Decoding],
        *,
        cache: Any = None,
        streamer: Any = None,
        **inputs: Tensor | EmbeddingsWithMemory,
    ) -> list[list[int]]:
        """Return the new ids of each sequence, by the ``generate`` of `transformers`.

        Args:
            mask: ``(B, T)``.
            decodings: of each row.
            cache: the KV cache of the first positions; it is extended.
            streamer: receives the tokens as they are generated.
            inputs: ``inputs_embeds (B, T, D_lm)`` or ``input_ids (B, T)``.

        Raises:
            MLLMError: rows that cannot be decoded together (`check_batch`), or an answer past the context (`fitted`).
        """
        return generation.generate(self, mask, decodings, cache=cache, streamer=streamer, **inputs)
