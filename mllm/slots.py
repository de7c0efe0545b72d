"""Define what every part is: the contracts of the slots, with shapes. Read this page first.

A part is found by its exact name (`mllm.registry`). A slot is a class to inherit from, or a protocol where it asks for
methods alone; what a part can do in addition is a type of `mllm.capabilities`. The first line of each says how a recipe
names one; it stands in the message where a model lacks it.

Shapes: B batch, T text tokens, I images, U tiles of them (one each, unless `encoder.tiles` cuts them), P patches and Q
visual tokens of a tile, D_vis and D_lm the widths of features and embeddings, V vocabulary, r tokens that a head reads,
L x W a condition of an image decoder, N texts, examples or visual tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from torch import Tensor, nn

from mllm.inputs import Inputs as Inputs
from mllm.media.images import ImageSource, open_image
from mllm.media.sizes import pixels_of
from mllm.media.tiles import Cutting, Layout, in_order
from mllm.prompts.batch import Batch
from mllm.prompts.pieces import Piece

if TYPE_CHECKING:  # named in signatures alone: the contracts stand below what fulfils them
    from mllm.data.items import Item
    from mllm.evaluation import Score
    from mllm.model import Model


class Encoder(nn.Module):
    """An encoder, pixels (or frames, or sound) to features; frozen: ``encoder: {model: ...}``.

    Attributes:
        dim: D_vis.
        grid: (rows, columns) of the patches, or None where the features are no grid.
        num_patches: P.
        shape: of one image as `preprocess` returns it.
        cacheable: whether features cost enough to be kept in the feature cache.
        tiling: how images are cut into tiles, or videos into segments, each encoded by itself; None: they are not.
        fingerprint: identifies its weights, and whatever else changes with the model (`mllm.hub.identity`).
    """

    dim: int
    grid: tuple[int, int] | None
    num_patches: int
    shape: tuple[int, ...] = ()
    cacheable = True
    tiling: Cutting | None = None
    reads_images = True  # and neither videos, sounds nor stored features
    reads_videos = False

    @property
    def fingerprint(self) -> str:
        """Return a hash of the weights, or what `mllm.hub.identity.fingerprint_of` makes of it."""
        raise NotImplementedError

    def settings(self) -> dict[str, Any]:
        """Return what, besides the fingerprint, determines the features: part of the feature cache's key."""
        raise NotImplementedError

    def open(self, piece: Any) -> Any:
        """Return an image of a prompt as `preprocess` takes it; one that is open already is returned as it is."""
        return open_image(piece)

    def key(self, source: ImageSource) -> str:
        """Return the key that a source's features are cached under: equal keys, equal features."""
        return source.key()

    def pixels(self, piece: Any) -> int:
        """Return the number of pixels that `open` decodes, read from the header."""
        return pixels_of(piece)

    def tiles(self, piece: Any) -> list[Any]:
        """Return an image's tiles as `preprocess` takes them: by default the opened image."""
        opened = self.open(piece)
        return [opened] if self.tiling is None else self.tiling.cut(opened)

    def layouts(self, pieces: Sequence[Any]) -> list[Layout] | None:
        """Return how images are cut, of which only the headers are read; None: they are not."""
        return None if self.tiling is None else [self.tiling.of(piece) for piece in pieces]

    def preprocess(self, items: Sequence[Any]) -> Tensor:
        """Return pixels ``(B, 3, H, W)`` of opened images, or another input of `forward`."""
        raise NotImplementedError

    def prepared(self, items: Sequence[Any]) -> Tensor:
        """Return opened images as `forward` takes them, too, in as few bytes as possible; threads call it."""
        return self.preprocess(items)

    def forward(self, pixels: Tensor) -> Tensor:
        """Return features ``(B, P, D_vis)``."""
        raise NotImplementedError


class Connector(nn.Module):
    """A connector, features to visual tokens; trained: ``connector: {type: linear}``.

    Features are cast to the type of its weights before `forward`: an encoder may be in half precision, and what trains
    is not. Other methods that read features cast them by `cast`.

    Its constructor takes keyword arguments alone: ``vis_dim`` (D_vis), ``lm_dim`` (D_lm; None where the recipe has no
    language model), ``num_patches`` (P), ``grid`` (rows and columns of the patches, or None), and its own options.

    With ``vocabulary: true`` its output is replaced by expected word embeddings when it is called, by a submodule
    ``vocabulary`` (`mllm.lms.words.Vocabulary`); its own ``forward`` is not changed.

    Attributes:
        num_tokens: Q.
        token_grid: rows and columns of the Q tokens, where each token is a place of the image; None: they are not.
        newline: the token ``(D_lm,)`` that ends a row of an image's tiles (`mllm.media.tiles`), where there are rows.
        reads_whole: whether Q tokens are made of all features of an image, whatever their number, where its cells are
            encoded together (`mllm.media.native`). Features are then padded with zeros, and `mask_of` says where.
        padded: whether they may be; set when the model is built.
    """

    reads_whole = False
    padded = False

    num_tokens: int
    token_grid: tuple[int, int] | None = None
    newline: nn.Parameter | None

    def __init__(self) -> None:
        super().__init__()
        self.register_parameter("newline", None)
        self.register_forward_pre_hook(_cast_features)

    def cast(self, features: Tensor) -> Tensor:
        """Return features in the type of the connector's weights."""
        weights = (parameter.dtype for parameter in self.parameters() if parameter.is_floating_point())
        return features.to(next(weights, features.dtype))

    def before_words(self, features: Tensor, *questions: Sequence[str]) -> Tensor:
        """Return what `forward` returns, ``(B, Q, D_lm)``, before a vocabulary, if there is one, replaces it."""
        return self.forward(self.cast(features), *questions)

    def mask_of(self, features: Tensor) -> Tensor | None:
        """Return which features are no padding ``(B, P)``; None: all."""
        return features.ne(0).any(-1) if self.padded else None

    def tokens_of(self, layout: Layout | None) -> int:
        """Return how many visual tokens an image takes, by its tiles; None: it is not cut, and takes Q."""
        if layout is None or self.padded:
            return self.num_tokens
        return layout.count(self.num_tokens, self.token_grid)

    def in_order(self, tokens: Tensor, layouts: Sequence[Layout] | None) -> Tensor:
        """Return images' visual tokens ``(N, D_lm)`` of the output ``(U, Q, D_lm)``; None: as they are."""
        return tokens if layouts is None or self.padded else in_order(tokens, layouts, self.token_grid, self.newline)

    def linear(self) -> nn.Linear | None:
        """Return the linear map that ends the connector, applied to ``body(features)``; None: it has none.

        A closed form sets it (`mllm.fits.connector`). By default: the submodule ``project``, if it is linear.
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


def _cast_features(connector: Any, args: Any) -> Any:
    return (connector.cast(args[0]), *args[1:]) if args else None


@runtime_checkable
class LanguageModel(Protocol):
    """A language model, interleaved embeddings to text; frozen: ``lm: {model: ...}``.

    `mllm.lms.language_model` runs any causal or encoder-decoder model of `transformers`.
    """

    def tokenize(self, text: str, *, control: bool = False) -> list[int]:
        """Return the ids of a text, no special token added; ``control``: special tokens in it are read as such."""

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids, special tokens left out."""

    def embed(self, ids: Tensor) -> Tensor:
        """Return embeddings ``(B, T, D_lm)`` of ids ``(B, T)``."""

    def logits(self, embeds: Any, mask: Tensor, keep: Tensor | None = None, cache: Any = None) -> Tensor:
        """Return logits ``(B, K, V)`` at the positions ``keep (K,)`` of embeddings ``(B, T, D_lm)``; None: at all."""

    def losses(self, embeds: Any, mask: Tensor, labels: Tensor, *, smoothing: float = 0.0) -> Tensor:
        """Return the negative log-likelihood ``(N,)`` of each target of ``labels (B, T)``, with label smoothing."""

    def hidden(self, embeds: Any, mask: Tensor) -> Tensor:
        """Return the last hidden states ``(B, T, D)``."""

    def prefill(self, embeds: Any, mask: Tensor) -> tuple[Any, Tensor]:
        """Return the KV cache of sequences, and the next token's logits ``(B, V)``."""


@runtime_checkable
class Adapter(Protocol):
    """An adapter, trained inside the language model, which its constructor takes: ``adapters: [{type: lora}]``."""

    def off(self) -> AbstractContextManager[None]:
        """Compute without it."""


class Head(nn.Module):
    """A head, which makes something other than text of the language model's states; trained: ``heads: [{type: ...}]``.

    Its constructor takes ``lm_dim`` and ``vis_dim`` (None where there is no such part) and its own options.

    Attributes:
        tokens: the new tokens whose states it reads, r of them; they are added to the language model by themselves.
    """

    tokens: tuple[str, ...] = ()


@runtime_checkable
class ImageDecoder(Protocol):
    """An image decoder; frozen: ``decoder: {type: diffusers, model: ...}``.

    Its class says by ``shape(**options)`` which condition it takes, and loads nothing.
    """

    condition: tuple[int, int]  # L, W

    @property
    def label(self) -> str:
        """Return its name in an answer."""

    def encode(self, texts: Sequence[str]) -> Tensor:
        """Return the conditions ``(N, L, W)`` that its own text encoder makes."""

    def draw(self, conditions: Tensor, seeds: Sequence[int]) -> list[Any]:
        """Return a PIL image for each of the conditions ``(N, L, W)``, sampled with its seed."""


@runtime_checkable
class Scorer(Protocol):
    """A scorer, images and texts in one space: ``scorer: {type: dual-encoder, model: ...}``.

    One that is a run declares an argument ``model: Model`` and is handed the loaded model.
    """

    def image_text(self, images: Sequence[Any], texts: Sequence[str]) -> Tensor:
        """Return similarities ``(I, N)``."""

    def embed_images(self, images: Sequence[Any]) -> Tensor:
        """Return vectors ``(I, D)`` of length 1, or ``(I, Q, D)`` of which the most similar one counts."""

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Return vectors ``(N, D)`` of length 1."""


class Objective(Protocol):
    """A loss over one batch: ``objectives: [{type: caption, weight: 1.0}]``; a stage sums weighted objectives.

    A sum and a count, not a mean: batches that are accumulated, or spread over processes, weigh each target the same.
    One that reads the training data before the first step is also an `mllm.capabilities.ReadsData`.
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
    """A closed form of one part: ``fit: {part: connector}``; the class to inherit is `mllm.fits.base.ClosedForm`."""

    def problems(self, model: Model) -> list[str]:
        """Return what the model lacks, and what to give; called on the meta device, too."""

    def __call__(self, model: Model, data: Any) -> float:
        """Fit the part on `mllm.fits.base.Material`, and return the measure that is logged."""


Reader = Callable[..., Sequence["Item"]]  # keyword arguments of ``data.train`` to items, read at once or when drawn
# Of predictions list[str] and references list[list[str]], in one order: see `mllm.evaluation`.
Metric = Callable[..., "Score"]
