"""Say what every part is: the contracts of the slots, with shapes. Read this page first.

A part is found by its exact name (`mllm.registry`), and is asked for what it can do by the types below, never by its
class or its name: ``model.find(RetrievalHead)`` returns the one part of a model that is a retrieval head, whoever wrote
it. A slot is a class to inherit from where it brings something along, and a protocol where it asks for methods alone.

Shapes: B batch, T text tokens, I images, P patches, Q visual tokens of an image, D_vis and D_lm the widths of features
and embeddings, V vocabulary, r tokens that a head reads, L x W a condition of an image decoder.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from torch import Tensor, nn

from mllm.media.images import ImageSource, open_image
from mllm.prompts.batch import Batch
from mllm.prompts.pieces import Piece

if TYPE_CHECKING:  # named in signatures alone: the contracts stand below what fulfils them
    from mllm.data.items import Item
    from mllm.evaluation import Score
    from mllm.model import Model


class Encoder(nn.Module):
    """Pixels (or video frames, or sound) to features; frozen.

    Attributes:
        dim: D_vis.
        grid: (rows, columns) of the patches, or None where the features are no grid.
        num_patches: P.
        shape: of one image as `preprocess` returns it.
        cacheable: whether features cost enough to be kept in the feature cache.
    """

    dim: int
    grid: tuple[int, int] | None
    num_patches: int
    shape: tuple[int, ...] = ()
    cacheable = True

    @property
    def fingerprint(self) -> str:
        """Return a hash of the weights."""
        raise NotImplementedError

    def settings(self) -> dict[str, Any]:
        """Return what, beside the weights, determines the features: part of the feature cache's key."""
        raise NotImplementedError

    def open(self, piece: Any) -> Any:
        """Return an image of a prompt as `preprocess` takes it; one that is open already is returned as it is."""
        return open_image(piece)

    def key(self, source: ImageSource) -> str:
        """Return what a source's features are cached under: equal keys, equal features."""
        return source.key()

    def preprocess(self, items: Sequence[Any]) -> Tensor:
        """Return pixels ``(B, 3, H, W)`` of opened images, or another input of `forward`."""
        raise NotImplementedError

    def forward(self, pixels: Tensor) -> Tensor:
        """Return features ``(B, P, D_vis)``."""
        raise NotImplementedError


@runtime_checkable
class EmbedsTexts(Protocol):
    """An encoder that also brings texts into the space of its features (a dual encoder)."""

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Return vectors ``(N, D_vis)``."""


class Connector(nn.Module):
    """Features to visual tokens of the language model's width; trained.

    Its constructor takes keyword arguments alone: ``vis_dim`` (D_vis), ``lm_dim`` (D_lm; None where the recipe has no
    language model), ``num_patches`` (P), ``grid`` (rows and columns of the patches, or None), and its own options.

    Attributes:
        num_tokens: Q.
    """

    num_tokens: int

    def tokens_of(self, piece: Any) -> int:
        """Return how many visual tokens an image of a prompt takes; today the same for every image."""
        return self.num_tokens

    def linear(self) -> nn.Linear | None:
        """Return the linear map that ends the connector, which is applied to ``body(features)``; None: it has none.

        It is what a closed form sets (`mllm.fits.connector`). By default: the submodule ``project``, if it is linear.
        """
        project = dict(self.named_children()).get("project")
        return project if isinstance(project, nn.Linear) else None

    def output(self) -> nn.Module | None:
        """Return the last submodule with weights, which is scaled to the embeddings before training; None: leave it.

        By default: the submodule ``norm``, or else ``project``.
        """
        children = dict(self.named_children())
        named = [children[name] for name in ("norm", "project") if name in children]
        return next((module for module in named if any(True for _ in module.parameters())), None)

    def forward(self, features: Tensor) -> Tensor:
        """Return visual tokens ``(B, Q, D_lm)`` of features ``(B, P, D_vis)``."""
        raise NotImplementedError


@runtime_checkable
class ReadsText(Protocol):
    """A connector that reads a text beside the features, in one transformer under three masks (BLIP-2, stage 1).

    Its ``words`` are a tokenizer, a table of words and positions, and a vocabulary head:
    `mllm.adapters.connectors.qformer_text.Words`.
    """

    def joint(self, features: Tensor, text_ids: Tensor, mask: Tensor, mode: Any) -> tuple[Tensor, Tensor]:
        """Return states of the queries ``(B, Q, dim)`` and of the text ``(B, T, dim)``."""

    def read(self, text_ids: Tensor, mask: Tensor) -> Tensor:
        """Return states ``(B, T, dim)`` of the text alone."""


@runtime_checkable
class LanguageModel(Protocol):
    """Interleaved embeddings to text; frozen. `mllm.lms.language_model` runs any model of `transformers`."""

    def tokenize(self, text: str, *, control: bool = False) -> list[int]:
        """Return the ids of a text, no special token added; ``control``: special tokens in it are read as such."""

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids, special tokens left out."""

    def embed(self, ids: Tensor) -> Tensor:
        """Return embeddings ``(B, T, D_lm)`` of ids ``(B, T)``."""

    def logits(self, embeds: Any, mask: Tensor, keep: Tensor | None = None, cache: Any = None) -> Tensor:
        """Return logits ``(B, K, V)`` at the positions ``keep (K,)`` of embeddings ``(B, T, D_lm)``; None: at all."""

    def losses(self, embeds: Any, mask: Tensor, labels: Tensor) -> Tensor:
        """Return the negative log-likelihood ``(N,)`` of each target of ``labels (B, T)``, row by row."""

    def hidden(self, embeds: Any, mask: Tensor) -> Tensor:
        """Return the last hidden states ``(B, T, D)``."""

    def prefill(self, embeds: Any, mask: Tensor) -> tuple[Any, Tensor]:
        """Return the KV cache of sequences, and the next token's logits ``(B, V)``."""


@runtime_checkable
class SentenceModel(Protocol):
    """Whole sentences to vectors, in the slot of the language model; it generates no text."""

    def sentences(self, texts: Sequence[str]) -> Tensor:
        """Return vectors ``(N, D_lm)`` of length 1."""


@runtime_checkable
class Adapter(Protocol):
    """A trained module inside the language model; its constructor takes that model and its own options."""

    def off(self) -> AbstractContextManager[None]:
        """Compute without it."""


@runtime_checkable
class PrefixAdapter(Protocol):
    """An adapter that puts trained positions before every sequence: see `EmbeddingPrefix` and `CachePrefix`."""

    @property
    def num_positions(self) -> int:
        """Return how many; 0 while the adapter is off."""


@runtime_checkable
class EmbeddingPrefix(PrefixAdapter, Protocol):
    """A prefix of embeddings (prompt tuning)."""

    def embeddings(self, rows: int) -> Tensor:
        """Return embeddings ``(B, positions, D_lm)``."""


@runtime_checkable
class CachePrefix(PrefixAdapter, Protocol):
    """A prefix of keys and values in every layer (prefix tuning)."""

    def states(self, rows: int) -> Any:
        """Return a KV cache that holds the prefix of B rows."""


@runtime_checkable
class CrossAttention(Protocol):
    """An adapter whose blocks attend to the visual tokens, which are then no part of the sequence (Flamingo).

    Its ``mark (D_lm,)`` is the embedding at an image's token.
    """

    @property
    def tokens_per_image(self) -> int:
        """Return how many tokens of the sequence an image takes; 0 while the adapter is off: the connector's number."""


class Head(nn.Module):
    """A trained module that makes something other than text of the language model's states.

    Its constructor takes ``lm_dim`` and ``vis_dim`` (None where there is no such part) and its own options.

    Attributes:
        tokens: the new tokens whose states it reads, r of them; they are added to the language model by themselves.
    """

    tokens: tuple[str, ...] = ()


class ImageTokenHead(Head):
    """A head whose tokens stand for an image in an answer: it retrieves or generates that image, or decides which."""


@runtime_checkable
class RetrievalHead(Protocol):
    """A head that brings prompts and images into one space; ``scale`` is the logarithm of the factor on cosines."""

    tokens: tuple[str, ...]  # the first one's state is read

    def of_states(self, states: Tensor) -> Tensor:
        """Return vectors ``(N, D)`` of length 1 of states ``(N, D_lm)`` at the token."""

    def of_features(self, features: Tensor) -> Tensor:
        """Return vectors ``(I, D)`` of length 1 of features ``(I, P, D_vis)``."""


@runtime_checkable
class ConditionHead(Protocol):
    """A head that makes an image decoder's condition."""

    tokens: tuple[str, ...]
    condition: tuple[int, int]  # L, W

    def __call__(self, states: Tensor, embeddings: Tensor) -> Tensor:
        """Return conditions ``(N, L, W)`` of last states and input embeddings ``(N, r, D_lm)``."""


@runtime_checkable
class RestoresStates(Protocol):
    """A head that also returns from a condition to the states (AlignerNet)."""

    def restore(self, conditions: Tensor) -> Tensor:
        """Return states ``(N, r, D_lm)`` of conditions ``(N, L, W)``."""


DECISIONS = ("retrieve", "generate")
"""What a decision head decides between."""


@runtime_checkable
class DecisionHead(Protocol):
    """A head that classifies a prompt: is an image retrieved, or generated?"""

    tokens: tuple[str, ...]  # the first one's state is read
    labels: tuple[str, ...]

    def __call__(self, states: Tensor) -> Tensor:
        """Return logits ``(N, labels)`` of states ``(N, D_lm)``."""


@runtime_checkable
class ContrastHead(Protocol):
    """A head that compares a connector's queries with texts that the connector reads (BLIP-2's ITC).

    ``temperature`` is what similarities are divided by.
    """

    def of_queries(self, states: Tensor) -> Tensor:
        """Return vectors ``(I, Q, D)`` of length 1 of images' states ``(I, Q, dim)``."""

    def of_texts(self, states: Tensor) -> Tensor:
        """Return vectors ``(N, D)`` of length 1 of texts' states ``(N, dim)``."""


@runtime_checkable
class MatchHead(Protocol):
    """A head that says whether an image and a text belong together (BLIP-2's ITM)."""

    def match(self, queries: Tensor) -> Tensor:
        """Return logits of no and yes ``(B, 2)`` of the queries' states ``(B, Q, dim)``."""


@runtime_checkable
class ImageHead(Protocol):
    """A head that makes an image of a sentence's vector.

    ``components`` is its linear map to pixels, ``project`` the one to the components.
    """

    side: int  # S

    def body(self, vectors: Tensor, noise: Tensor | None = None) -> Tensor:
        """Return what ``project`` is applied to, of vectors ``(N, D)``; ``noise``: a normal draw of their shape."""

    def __call__(self, vectors: Tensor, seeds: list[int]) -> Tensor:
        """Return images ``(N, 3, S, S)`` between 0 and 1 of vectors ``(N, D)``."""


@runtime_checkable
class ImageDecoder(Protocol):
    """A frozen model that makes images; its class says by ``shape(**options)`` which condition, and loads nothing."""

    condition: tuple[int, int]  # L, W

    @property
    def label(self) -> str:
        """Return its name in an answer."""

    def encode(self, texts: Sequence[str]) -> Tensor:
        """Return the conditions ``(N, L, W)`` that its own text encoder makes."""

    def draw(self, conditions: Tensor, seeds: Sequence[int]) -> list[Any]:
        """Return a PIL image for each of the conditions ``(N, L, W)``, sampled with its seed."""


@runtime_checkable
class Denoises(Protocol):
    """An image decoder with a training loss of its own."""

    def denoise(self, images: Sequence[Any], conditions: Tensor) -> Tensor:
        """Return the denoising loss ``(N,)`` of images under conditions ``(N, L, W)``."""


@runtime_checkable
class Scorer(Protocol):
    """Images and texts in one space. A run that is a scorer declares an argument ``model: Model``."""

    def image_text(self, images: Sequence[Any], texts: Sequence[str]) -> Tensor:
        """Return similarities ``(I, N)``."""

    def embed_images(self, images: Sequence[Any]) -> Tensor:
        """Return vectors ``(I, D)`` of length 1."""

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Return vectors ``(N, D)`` of length 1."""


@runtime_checkable
class MatchesPairs(Protocol):
    """A scorer that also reads an image and a text together, and so reranks the first candidates of a ranking."""

    rerank: int  # how many of the first candidates it reads pair by pair

    def matches(self, images: Sequence[Any], texts: Sequence[str]) -> Tensor:
        """Return the log-odds ``(N,)`` that each of N images and the text at the same index belong together."""


@runtime_checkable
class ReadsPrompts(Protocol):
    """A scorer that also embeds interleaved prompts of texts and images."""

    def embed_prompts(self, prompts: Sequence[Sequence[Piece]]) -> Tensor:
        """Return vectors ``(N, D)`` of length 1 of N prompts."""


class Inputs:
    """A batch as objectives see it.

    Args:
        model: the model that trains.
        rows: the training examples, as interleaved prompts.
        features: ``(I, P, D_vis)`` of their images in reading order, or None where there are none.
        batch: the rows as ids, padded; None where the model has no language model.
    """

    def __init__(self, model: Model, rows: Sequence[Sequence[Piece]], features: Tensor | None, batch: Batch | None):
        self.model, self.rows, self.features, self.batch = model, rows, features, batch
        self.shared: dict[str, Any] = {}  # what one objective computed and another needs too

    @cached_property
    def visual(self) -> Tensor | None:
        """The connector's visual tokens ``(I, Q, D_lm)``, computed once for all objectives."""
        return None if self.features is None else self.model.connector(self.features)


class Objective(Protocol):
    """A loss over one batch; a stage sums weighted objectives.

    A sum and a count, not a mean: batches that are accumulated, or spread over processes, weigh each target the same.
    """

    @property
    def needs(self) -> Sequence[type]:
        """Return the contracts of this page that the model must have a part for."""

    @property
    def per_example(self) -> bool:
        """Whether the sum is one of each example by itself, so that a batch may be computed in parts."""

    def count(self, rows: Sequence[Sequence[Piece]], batch: Batch | None) -> int:
        """Return by how much the sum is divided; called before the model computes anything."""

    def __call__(self, inputs: Inputs) -> Tensor:
        """Return the summed loss, a scalar."""


class Fit(Protocol):
    """A closed form of one part, found by the part's registry name; `mllm.fits.base.Fit` is the class to inherit."""

    def problems(self, model: Model) -> list[str]:
        """Return what the model lacks, and what to give; called on the meta device, too."""

    def __call__(self, model: Model, data: Any) -> float:
        """Fit the part on `mllm.fits.base.Material`, and return the measure that is logged."""


Reader = Callable[..., Sequence["Item"]]
"""A file format to items: keyword arguments of ``data.train``, and a list (or a lazy sequence) of items."""

Metric = Callable[..., "Score"]
"""Predictions ``list[str]`` and references ``list[list[str]]``, in the same order, to a `mllm.evaluation.Score`."""


RECIPE: dict[type, str] = {
    Encoder: "an encoder: encoder: {model: ...}",
    EmbedsTexts: "an encoder that embeds texts: encoder: {type: dual-encoder, model: ...}",
    Connector: "a connector: connector: {type: linear}",
    ReadsText: "a connector that reads text: connector: {type: qformer, words: ...}",
    LanguageModel: "a language model: lm: {model: ...}",
    SentenceModel: "a sentence encoder in the language model's slot: lm: {type: sentences, model: mllm/minilm}",
    ImageTokenHead: "a head that shows images: heads: [{type: retrieval}]",
    RetrievalHead: "a retrieval head: heads: [{type: retrieval}]",
    ConditionHead: "a head that makes an image decoder's condition: heads: [{type: generation}]",
    DecisionHead: "a decision head: heads: [{type: decision}]",
    ContrastHead: "a contrast head: heads: [{type: contrast}]",
    MatchHead: "a match head: heads: [{type: match}]",
    ImageHead: "a head that makes images: heads: [{type: pixels}]",
    ImageDecoder: "an image decoder: decoder: {type: diffusers, model: ...}",
    Denoises: "an image decoder with a denoising loss: decoder: {type: diffusers, model: ...}",
}


def missing(kind: type) -> str:
    """Return what a model lacks that has no part of a kind, and how a recipe gives it."""
    return RECIPE.get(kind, f"a part that is a {kind.__module__}.{kind.__name__}")
