"""The language model whose layers an engine runs: here are its tokenizer, its configuration and its embedding table."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any, NoReturn

import torch
from torch import Tensor

from mllm.engines.base import Engine, Request, Source
from mllm.engines.table import model_with_table
from mllm.errors import MLLMError
from mllm.hub.fingerprints import fingerprint
from mllm.lms.decoding import Decoding, check_batch
from mllm.lms.generation import answer_ids, fitted, model_defaults, stream_rows
from mllm.lms.language_model import LanguageModel
from mllm.lms.runners.base import Runner
from mllm.lms.runners.unpadded import EmbeddingCache, UnpaddedRunner


class EngineRunner(UnpaddedRunner):
    """Embeds sequences for an engine: its cache has their embeddings, and no layer is run."""

    def logits(self, embeds: Tensor, mask: Tensor, keep: Tensor | None = None, cache: Any = None) -> Tensor:
        """Extend the cache; return logits ``(B, K, V)`` without values."""
        if cache is not None:
            cache.add(embeds)
        count, vocabulary = embeds.shape[1] if keep is None else len(keep), self.model.config.get_text_config()
        return torch.empty(len(embeds), count, vocabulary.vocab_size, device="meta")

    def body(self, embeds: Tensor, mask: Tensor, cache: Any = None) -> NoReturn:
        """Refuse: no layer is here."""
        raise MLLMError("An engine returns tokens, and no hidden states or losses. Use engine: transformers.")

    def hidden(self, embeds: Tensor, mask: Tensor) -> NoReturn:
        """Refuse: no layer is here."""
        self.body(embeds, mask)


class EngineLanguageModel(LanguageModel):
    """A frozen language model without its layers, which an engine has.

    Args:
        engine: the engine; `open` starts it.
        options: those of `mllm.lms.language_model.LanguageModel`.

    Attributes:
        engine: what runs the layers.
        model: the model of `transformers`; only its embedding table has values, and is moved with this module.
    """

    def __init__(self, *, engine: Engine, **options: Any) -> None:
        super().__init__(**options)
        self.engine, self._name = engine, str(options["model"])
        model = self.model
        del self._modules["model"]  # or else tensors without values would be moved, saved and hashed with it
        self.__dict__["model"] = model
        self.table = model.get_input_embeddings()
        self._limit: int | None = None

    def _load(self, folder: str, **options: Any) -> Any:
        """Load the embedding table alone."""
        return model_with_table(folder, dtype=options["dtype"], **self._code)

    def _choose_runner(self) -> Runner:
        return EngineRunner(self.model)

    @property
    def context(self) -> int | None:
        """Return the context length, without adapters' positions: that of the engine, where it is shorter."""
        limits = [limit for limit in (super().context, self._limit) if limit is not None]
        return min(limits) if limits else None

    def open(self, **lora: Any) -> None:
        """Start the engine, when the embedding table and the adapters have their weights.

        Args:
            lora: the fields of `mllm.engines.base.Source` on a LoRA of peft; none: there is no LoRA.

        Raises:
            MLLMError: it cannot be started, or has another language model.
        """
        source = Source(
            name=self._name,
            folder=self._folder if not os.path.isdir(self._folder) else os.path.abspath(self._folder),
            dtype=str(self.table.weight.dtype).removeprefix("torch."),
            context=super().context,
            fingerprint=fingerprint(self._folder),
            tokenize=self.tokenize,
            embed=self._embedded,
            **lora,
            **self._code,
        )
        limit = self.engine.open(source)
        self._limit = None if limit is None else limit - self._prefix_length

    def check(self, decoding: Decoding) -> None:
        """Refuse decoding options that the engine does not have, those of ``generation_config.json`` included."""
        self.engine.check(self._complete(decoding))

    def submit(
        self,
        mask: Tensor,
        decodings: Sequence[Decoding],
        *,
        cache: EmbeddingCache | None = None,
        puts: Sequence[Callable[[list[int]], Any]] | None = None,
        **inputs: Tensor,
    ) -> list[Future[list[int]]]:
        """Queue the sequences of a batch at the engine, and return futures of their answers' new ids.

        Args:
            mask: ``(B, T)``.
            decodings: of each row.
            cache: the embeddings of the first positions; it is extended.
            puts: are called with each row's new ids as they are generated, its end included; None: nobody is told.
            inputs: ``inputs_embeds (B, T, D_lm)`` or ``input_ids (B, T)``.

        Raises:
            MLLMError: rows that cannot be decoded together, an option that the engine does not have, or an answer past
                the context.
        """
        check_batch(decodings)
        lengths, prompts = mask.sum(1).tolist(), dict[int, Tensor]()
        complete = [self._complete(fitted(self, *row)) for row in zip(decodings, lengths, strict=True)]
        for decoding in complete:
            self.engine.check(decoding)
        for group in self.runner.groups(mask, cache, **inputs):
            prompts |= zip(group.rows, group.inputs["inputs_embeds"].detach().cpu(), strict=True)
        return [
            self.engine.submit(Request(prompts[row], decoding, self.text.ends, puts[row] if puts else _nothing))
            for row, decoding in enumerate(complete)
        ]

    def generate(
        self, mask: Tensor, decodings: Sequence[Decoding], *, cache: Any = None, streamer: Any = None, **inputs: Any
    ) -> list[list[int]]:
        """Return the new ids of each sequence, which the engine answers at the same time.

        The arguments are those of `mllm.lms.language_model.LanguageModel.generate`.
        """
        alone = streamer is not None and len(decodings) == 1
        if alone:
            streamer.put(torch.empty(1, 0, dtype=torch.long))  # the prompt
        puts = [lambda ids: [streamer.put(torch.tensor([token])) for token in ids]] if alone else None
        futures = self.submit(mask, decodings, cache=cache, puts=puts, **inputs)
        answers = [self.answer_ids(future) for future in futures]
        if alone:
            streamer.end()
        elif streamer is not None:
            stream_rows(streamer, answers, self.eos)
        return answers

    def answer_ids(self, future: Future[list[int]]) -> list[int]:
        """Wait for an answer, and return its ids without its end."""
        return answer_ids(self.text, future.result())

    def _complete(self, decoding: Decoding) -> Decoding:
        """Return a decoding with the options that the model's ``generation_config.json`` sets."""
        return replace(decoding, generation={**model_defaults(self.model), **decoding.generation})

    @torch.no_grad()
    def _embedded(self, ids: Sequence[int]) -> Tensor:
        return self.embed(torch.tensor([list(ids)], device=self.table.weight.device))[0].cpu()


def _nothing(ids: list[int]) -> None:
    """Take new ids that nobody waits for."""
