"""Define what some parts can do in addition to their contract (`mllm.slots`): the types that a model is searched by.

``model.find(RetrievalHead)`` returns the one part of a model that is a retrieval head, whoever wrote it; an objective
lists the types that it ``needs``. The first line of each says how a recipe names one: it stands in the message where a
model lacks it.

Shapes: as in `mllm.slots`; r tokens that a head reads, L x W a condition of an image decoder, N texts or examples.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal, Protocol, runtime_checkable

from torch import Tensor

from mllm.prompts.pieces import Piece
from mllm.slots import Head


@runtime_checkable
class CollectsTexts(Protocol):
    """A connector that compares features with those of training captions: ``connector: {type: nearest-texts}``."""

    places: int  # the most texts
    collected: Tensor  # how many there are

    def collect(self, features: Tensor) -> None:
        """Set the texts' features ``(N, P, D_vis)``; N is at most ``places``."""


@runtime_checkable
class ReadsText(Protocol):
    """A connector that reads text beside the features: ``connector: {type: qformer, words: ...}``.

    One transformer under three masks (BLIP-2, stage 1). Its ``words`` are a tokenizer, a table of words and positions,
    and a vocabulary head: `mllm.adapters.connectors.qformer_text.Words`.
    """

    def joint(self, features: Tensor, text_ids: Tensor, mask: Tensor, mode: Any) -> tuple[Tensor, Tensor]:
        """Return states of the queries ``(B, Q, dim)`` and of the text ``(B, T, dim)``."""

    def read(self, text_ids: Tensor, mask: Tensor) -> Tensor:
        """Return states ``(B, T, dim)`` of the text alone."""


@runtime_checkable
class ReadsQuestions(Protocol):
    """A connector that reads an image's question beside it: ``connector: {type: qformer, questions: true}``.

    Its ``forward`` takes the question of each image (`mllm.prompts.questions`) after the features. Without questions it
    reads the images alone, as where there is no prompt: a scorer, or nearest words.
    """

    reads_questions: Literal[True]


@runtime_checkable
class SpeaksWords(Protocol):
    """A connector whose output is expressed in words: ``connector: {type: ..., vocabulary: true}``."""

    vocabulary: Any  # mllm.lms.words.Vocabulary


@runtime_checkable
class RemembersTexts(Protocol):
    """A connector that looks up texts: ``connector: {type: memory}``."""

    def remember(self, texts: Sequence[Sequence[Tensor]], neutral: Tensor) -> None:
        """Set each memory's texts: the word embeddings ``(T, D_lm)`` of each; and the neutral word's ``(D_lm,)``."""


@runtime_checkable
class ReadsData(Protocol):
    """An objective that reads the training data before the first step: ``objectives: [{type: word-alignment}]``."""

    def read_data(self, model: Any, texts: Iterable[str]) -> None:
        """Read the answers of a stage's training items; it is called again when a run is resumed."""


@runtime_checkable
class ReadsNoPrompt(Protocol):
    """An objective of images and targets alone: ``objectives: [{type: word-alignment}]``.

    Where a stage has no other, a prompt's solved examples are left out of its training examples.
    """

    reads_no_prompt: Literal[True]


@runtime_checkable
class SentenceModel(Protocol):
    """A sentence encoder in the language model's slot: ``lm: {type: sentences, model: mllm/minilm}``."""

    def sentences(self, texts: Sequence[str]) -> Tensor:
        """Return vectors ``(N, D_lm)`` of length 1; it generates no text."""


@runtime_checkable
class PrefixAdapter(Protocol):
    """An adapter with trained positions before every sequence: ``adapters: [{type: prompt}]``.

    It has ``embeddings(rows)``, ``(B, positions, D_lm)``, or is a `CachePrefix`.
    """

    @property
    def num_positions(self) -> int:
        """Return how many; 0 while the adapter is off."""


@runtime_checkable
class CachePrefix(PrefixAdapter, Protocol):
    """A prefix of keys and values in every layer: ``adapters: [{type: prefix}]``."""

    def states(self, rows: int) -> Any:
        """Return a KV cache that holds the prefix of B rows."""


@runtime_checkable
class CrossAttention(Protocol):
    """An adapter whose blocks attend to visual tokens outside of the sequence: ``adapters: [{type: gated}]``.

    Its ``mark (D_lm,)`` is the embedding at an image's token.
    """

    @property
    def tokens_per_image(self) -> int:
        """Return how many tokens of the sequence an image takes; 0 while the adapter is off: the connector's number."""


@runtime_checkable
class PeftAdapter(Protocol):
    """An adapter that peft loads from files, and an engine with it: ``adapters: [{type: lora}]``."""

    peft_config: Any  # a peft.PeftConfig

    def peft_tensors(self) -> dict[str, Tensor]:
        """Return its tensors on the CPU, by the names that they have in peft's files."""


@runtime_checkable
class RunsOnEngine(Protocol):
    """A language model whose layers an engine runs: ``mllm.load(run, engine="vllm")``."""

    engine: Any  # an mllm.engines.base.Engine

    def check(self, decoding: Any) -> None:
        """Refuse a decoding that the engine does not have."""

    def submit(self, mask: Tensor, decodings: Any, *, puts: Any = None, **inputs: Any) -> list[Any]:
        """Queue sequences, and return futures of their new ids; `mllm.engines.language_model` has the arguments."""

    def answer_ids(self, future: Any) -> list[int]:
        """Wait for an answer, and return its ids without its end."""


class ImageTokenHead(Head):
    """A head whose tokens stand for an image in an answer: ``heads: [{type: retrieval}]``."""


@runtime_checkable
class RetrievalHead(Protocol):
    """A retrieval head: ``heads: [{type: retrieval}]``. Its ``scale`` is the logarithm of the factor on cosines."""

    tokens: tuple[str, ...]  # the first one's state is read

    def of_states(self, states: Tensor) -> Tensor:
        """Return vectors ``(N, D)`` of length 1 of states ``(N, D_lm)`` at the token."""

    def of_features(self, features: Tensor) -> Tensor:
        """Return vectors ``(I, D)`` of length 1 of features ``(I, P, D_vis)``."""


@runtime_checkable
class ConditionHead(Protocol):
    """A head that makes an image decoder's condition: ``heads: [{type: generation}]``."""

    tokens: tuple[str, ...]
    condition: tuple[int, int]  # L, W

    def __call__(self, states: Tensor, embeddings: Tensor) -> Tensor:
        """Return conditions ``(N, L, W)`` of last states and input embeddings ``(N, r, D_lm)``."""


@runtime_checkable
class RestoresStates(Protocol):
    """A head that also returns from a condition to the states: ``heads: [{type: aligner}]``."""

    def restore(self, conditions: Tensor) -> Tensor:
        """Return states ``(N, r, D_lm)`` of conditions ``(N, L, W)``."""


DECISIONS = ("retrieve", "generate")  # what a decision head decides between


@runtime_checkable
class DecisionHead(Protocol):
    """A decision head (retrieve or generate an image): ``heads: [{type: decision}]``."""

    tokens: tuple[str, ...]  # the first one's state is read
    labels: tuple[str, ...]

    def __call__(self, states: Tensor) -> Tensor:
        """Return logits ``(N, labels)`` of states ``(N, D_lm)``."""


@runtime_checkable
class ContrastHead(Protocol):
    """A contrast head (BLIP-2's ITC): ``heads: [{type: contrast}]``. Similarities are divided by ``temperature``."""

    def of_queries(self, states: Tensor) -> Tensor:
        """Return vectors ``(I, Q, D)`` of length 1 of images' states ``(I, Q, dim)``."""

    def of_texts(self, states: Tensor) -> Tensor:
        """Return vectors ``(N, D)`` of length 1 of texts' states ``(N, dim)``."""


@runtime_checkable
class MatchHead(Protocol):
    """A match head (BLIP-2's ITM): ``heads: [{type: match}]``."""

    def match(self, queries: Tensor) -> Tensor:
        """Return logits of no and yes ``(B, 2)`` of the queries' states ``(B, Q, dim)``."""


@runtime_checkable
class ImageHead(Protocol):
    """A head that makes an image of a sentence's vector: ``heads: [{type: pixels}]``."""

    side: int  # S

    def body(self, vectors: Tensor, noise: Tensor | None = None) -> Tensor:
        """Return the input of its map ``project``, of vectors ``(N, D)``; ``noise``: a normal draw of their shape."""

    def __call__(self, vectors: Tensor, seeds: list[int]) -> Tensor:
        """Return images ``(N, 3, S, S)`` between 0 and 1 of vectors ``(N, D)``."""


@runtime_checkable
class Denoises(Protocol):
    """An image decoder with a denoising loss: ``decoder: {type: diffusers, model: ...}``."""

    def denoise(self, images: Sequence[Any], conditions: Tensor) -> Tensor:
        """Return the loss ``(N,)`` of images under conditions ``(N, L, W)``."""


@runtime_checkable
class MatchesPairs(Protocol):
    """A scorer that also reads an image and a text together: ``scorer: {type: matching, model: RUN}``."""

    rerank: int  # how many of the first candidates of a ranking it reads pair by pair

    def matches(self, images: Sequence[Any], texts: Sequence[str]) -> Tensor:
        """Return the log-odds ``(N,)`` that each of N images and the text at the same index belong together."""


@runtime_checkable
class ReadsPrompts(Protocol):
    """A scorer that also embeds interleaved prompts: ``scorer: {type: retrieval, model: RUN}``."""

    def embed_prompts(self, prompts: Sequence[Sequence[Piece]]) -> Tensor:
        """Return vectors ``(N, D)`` of length 1."""


SEVERAL: tuple[type, ...] = (ImageTokenHead,)  # kinds that a model may have several parts of, which work together


def missing(*kinds: type) -> str:
    """Return what a model lacks that has no part of one of these kinds, and how a recipe names one."""
    return ", or ".join(map(_described, kinds))


def _described(kind: type) -> str:
    first = (kind.__doc__ or "").split("\n\n")[0].split(". ")[0].strip().rstrip(".").replace("``", "")
    return " ".join(first.split())[:1].lower() + " ".join(first.split())[1:] or kind.__name__
