"""Join encoder, connector and language model, and run a batch through them.

Shapes: B batch, T text tokens, I images, U tiles of them (`mllm.slots`), P patches, Q visual tokens, D_vis, D_lm, V.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from mllm.capabilities import CrossAttention
from mllm.config.parts import FROZEN, SCORER, AssemblySpec
from mllm.encoders.texts import features_of
from mllm.errors import MLLMError
from mllm.guides.base import Guides
from mllm.guides.contracts import Ask
from mllm.lms.cross_attention import embed_with_memory
from mllm.lms.shared_prefix import SharedPrefixes
from mllm.media.native import together
from mllm.media.tiles import Cutting, Layout, whole_images
from mllm.parts import Parts
from mllm.prompts.batch import Batch, Encoded, collate, encode
from mllm.prompts.length import too_long
from mllm.prompts.pieces import Counts, Piece, images_of
from mllm.slots import ImageDecoder, Inputs, LanguageModel, Objective


class Model(Parts):
    """A multimodal language model joined from parts. A part that is absent is None.

    Args:
        encoder: pixels to features ``(B, P, D_vis)``; frozen.
        connector: features to visual tokens ``(B, Q, D_lm)``; trained.
        lm: the language model; frozen.
        adapters: trained modules inside the language model.
        heads: trained modules on the language model's states, by name.
        tokens: new tokens, whose embeddings are trained.
        decoder: an image decoder; frozen.
        spec: the specification that the parts were built from, saved with the trained tensors.
        guides: frozen models that answers or a stage ask, such as the scorer; they are neither trained nor saved.
    """

    def __init__(
        self,
        *,
        encoder: nn.Module | None,
        connector: nn.Module | None,
        lm: nn.Module | None,
        adapters: Sequence[nn.Module] = (),
        heads: Mapping[str, nn.Module] | None = None,
        tokens: nn.Module | None = None,
        decoder: ImageDecoder | None = None,
        spec: AssemblySpec,
        guides: Guides,
    ) -> None:
        super().__init__()
        self.encoder, self.connector, self.lm = encoder, connector, lm
        self.adapters = nn.ModuleList(adapters)
        self.heads = nn.ModuleDict(heads)
        self.tokens, self.decoder = tokens, decoder
        self.spec = spec
        self.guides = guides
        self.source = self.fingerprint = ""  # of a loaded model: its folder, and a hash of its tensors and frozen parts
        self.prefixes = SharedPrefixes()
        self.calibrated = False  # whether the connector's output has been scaled to the language model's embeddings
        self.eval()

    @property
    def device(self) -> torch.device:
        """Return the device of the parameters."""
        return next(self.parameters()).device

    def train(self, mode: bool = True) -> Model:
        """Set training mode for trained parts; frozen parts stay in evaluation mode.

        So does batch normalization in the encoder: with batch statistics the images of a batch would influence each
        other, and the way a batch is split would change the result.
        """
        super().train(mode)
        self.prefixes.drop()
        for name in FROZEN:
            if (part := self.slot(name)) is not None:
                part.eval()
        for path in self.spec.trained:
            self.get_submodule(path).train(mode)
        for module in self.encoder.modules() if self.encoder is not None else ():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        self.adapters.train(mode)  # peft's modules are inside the language model
        return self

    @property
    def generates_text(self) -> bool:
        """Whether the language model generates text; a sentence encoder in its slot does not."""
        return isinstance(self.lm, LanguageModel)

    @property
    def encoder_trains(self) -> bool:
        """Whether parameters of the encoder train, so that features are recomputed in every step."""
        return self.encoder is not None and any(p.requires_grad for p in self.encoder.parameters())

    @property
    def lm_trains(self) -> bool:
        """Whether parameters inside the language model train, so that gradients flow through all of its inputs."""
        return any(p.requires_grad for part in (self.lm, self.adapters) for p in part.parameters())

    def encoded(self, tiles: Sequence[Any]) -> Tensor:
        """Return the encoder's features ``(U, P, D_vis)`` of images' tiles (`mllm.slots.Encoder.tiles`)."""
        with torch.no_grad():
            return features_of(self.encoder, tiles, self.device)

    def features(self, images: Sequence[Any]) -> Tensor:
        """Return the encoder's features ``(I, P, D_vis)`` of images in any accepted form, each as a whole."""
        features = self.encoded([self.encoder.open(image) for image in images])
        return whole_images(features, self.layouts(images)) if self.joint else features

    def overview(self, images: Sequence[Any]) -> Tensor:
        """Return the visual tokens ``(I, Q, D_lm)`` of images in any accepted form, each as a whole."""
        opened = [self.encoder.open(image) for image in images]
        layouts = self.layouts(opened) if self.joint else None
        return self.whole(self.connect(self.encoded(opened), layouts), layouts)

    def connect(self, features: Tensor, layouts: Sequence[Layout] | None) -> Tensor:
        """Return the connector's output ``(U, Q, D_lm)`` of features ``(U, P, D_vis)`` of images' units."""
        return self.connector(self.arranged(features, layouts))

    def arranged(self, features: Tensor, layouts: Sequence[Layout] | None) -> Tensor:
        """Return features ``(U, P, D_vis)`` of images' units as the connector takes them."""
        return features if layouts is None or not self.connector.padded else together(features, layouts)

    def whole(self, tokens: Tensor, layouts: Sequence[Layout] | None) -> Tensor:
        """Return the visual tokens ``(I, Q, D_lm)`` of whole images, of the connector's output."""
        return tokens if self.connector.padded else whole_images(tokens, layouts)

    @property
    def joint(self) -> bool:
        """Whether the encoder makes cells of an image as a whole (`mllm.media.native`)."""
        return self.tiling is not None and self.tiling.joint

    @property
    def tiling(self) -> Cutting | None:
        """Return how images are cut into tiles, or videos into segments; None: they are not."""
        tiling: Cutting | None = None if self.encoder is None else self.encoder.tiling
        return tiling

    def layouts(self, images: Sequence[Any]) -> list[Layout] | None:
        """Return how images are cut into tiles; None: they are not."""
        return None if self.encoder is None else self.encoder.layouts(images)

    def tiles_of(self, images: Sequence[Any]) -> int:
        """Return the number of tiles of images together."""
        layouts = self.layouts(images)
        return len(images) if layouts is None else sum(layout.tiles for layout in layouts)

    def in_order(self, tokens: Tensor, layouts: Sequence[Layout] | None) -> Tensor:
        """Return images' visual tokens as `embed` takes them, of those of their tiles ``(U, Q, D_lm)``."""
        return tokens if layouts is None else self.connector.in_order(tokens, layouts)

    def see_images(self, images: Sequence[Any]) -> Tensor | None:
        """Return images' visual tokens as `embed` takes them; None: there are no images."""
        if not images:
            return None
        features = self.encoded([tile for image in images for tile in self.encoder.tiles(image)])
        layouts = self.layouts(images)
        return self.in_order(self.connect(features, layouts), layouts)

    def forward(
        self,
        rows: Sequence[Sequence[Piece]],
        features: Tensor | None,
        batch: Batch | None,
        objectives: Sequence[Objective],
    ) -> list[Tensor]:
        """Return each objective's summed loss.

        Args:
            rows: training examples, as interleaved prompts.
            features: ``(U, P, D_vis)`` of their tiles in order, or None; while the encoder trains, its inputs instead.
            batch: the rows as ids.
            objectives: see `mllm.slots.Objective`.
        """
        if features is not None and self.encoder_trains:
            features = self.encoder(features)
        inputs = Inputs(self, rows, features, batch)
        return [objective(inputs) for objective in objectives]

    @property
    def cross_attention(self) -> CrossAttention | None:
        """Return the cross-attention adapter; None where the visual tokens are part of the sequence."""
        return next((adapter for adapter in self.find_all(CrossAttention).values() if adapter.tokens_per_image), None)

    @property
    def tokens_per_image(self) -> int:
        """Return the tokens of the sequence per image; where `encoder.tiles` cuts images, the most of any image."""
        if self.connector is None:
            return 0
        if (adapter := self.cross_attention) is not None:
            return adapter.tokens_per_image
        return max(map(self.connector.tokens_of, [None] if self.tiling is None else self.tiling.fullest))

    @property
    def counts(self) -> Counts:
        """Return the tokens of the sequence of an image: a number, or a function of the image."""
        tiling = self.tiling
        if tiling is None or self.connector is None:
            return self.tokens_per_image
        return lambda image: self.connector.tokens_of(tiling.of(image))

    @property
    def tiles_per_image(self) -> int:
        """Return the tiles of an image; where `encoder.tiles` cuts images, the most of any image."""
        return 1 if self.tiling is None else max(layout.tiles for layout in self.tiling.fullest)

    def embed(self, visual: Tensor | None, batch: Batch) -> Any:
        """Return embeddings ``(B, T, D_lm)`` of the text, with visual tokens of `see_images` at the image positions.

        With cross-attention it is a `mllm.lms.cross_attention.EmbeddingsWithMemory`.
        """
        embeds = self.lm.embed(batch.ids)  # (B, T, D_lm)
        if visual is None:
            return embeds
        if (adapter := self.cross_attention) is not None:
            return embed_with_memory(embeds, visual, batch, cast(Any, adapter).mark)
        return embeds.masked_scatter(batch.visual.unsqueeze(-1), visual.to(embeds.dtype))

    def logits(self, visual: Tensor | None, batch: Batch, keep: Tensor | None = None) -> Tensor:
        """Return logits ``(B, K, V)`` at the positions ``keep (K,)``; None: all."""
        return self.lm.logits(self.embed(visual, batch), batch.mask, keep)

    def encode(self, pieces: Sequence[Piece], *, start: bool = True) -> Encoded:
        """Return an interleaved prompt as ids, with one position for each visual token.

        Raises:
            MLLMError: the model generates no text, or the prompt is longer than the language model's context.
        """
        if not self.generates_text:
            raise MLLMError(
                "This model cannot answer: it has no language model that generates text. Train a recipe with one "
                "(lm.type=transformers), or use this one as a scorer: scorer={'type': 'aligned', 'model': RUN}."
            )
        encoded = encode(pieces, lm=self.lm, num_visual=self.counts, start=start)
        if self.lm.context is not None and len(encoded.ids) >= self.lm.context:
            raise too_long(pieces, len(encoded.ids), self.lm.context, self.counts)
        return encoded

    def prepare(self, prompts: Sequence[Sequence[Piece]]) -> tuple[Any, Batch]:
        """Return embeddings (see `embed`) and the padded batch of interleaved prompts."""
        return self.embedded(prompts, [self.encode(pieces) for pieces in prompts])

    @torch.no_grad()
    def embedded(self, prompts: Sequence[Sequence[Piece]], encoded: Sequence[Encoded]) -> tuple[Any, Batch]:
        """Return embeddings (see `embed`) and the padded batch of prompts that are already encoded."""
        batch = collate(encoded, self.lm.pad).to(self.device)
        visual = self.see_images([image for pieces in prompts for image in images_of(pieces)])
        return self.embed(visual, batch), batch

    @property
    def scorer(self) -> Any:
        """Return the guide that answers are chosen by: the recipe's ``scorer``, or else the model itself."""
        return self.guides.open(SCORER, self)

    def guide(self, ask: Ask) -> Any:
        """Return the guide that is asked for; see `mllm.guides.base.Guides.find`."""
        return self.guides.find(ask, self)

    @property
    def width(self) -> int | None:
        """Return D_lm: the language model's, or without one the connector's own; None: there is neither."""
        return self.lm.dim if self.lm is not None else self.spec.connector and self.spec.connector.width
