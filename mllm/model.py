"""Join encoder, connector and language model, and run a batch through them.

Shapes: B batch, T text tokens, I images, P patches, Q visual tokens, D_vis, D_lm, V vocabulary.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from mllm.capabilities import CrossAttention, missing
from mllm.config.parts import FROZEN, AssemblySpec
from mllm.errors import MLLMError, near
from mllm.hub.fingerprints import tensor_hash
from mllm.lms.cross_attention import embed_with_memory
from mllm.prompts.batch import Batch, Encoded, collate, encode
from mllm.prompts.pieces import Piece, images_of
from mllm.slots import ImageDecoder, Inputs, LanguageModel, Objective

Kind = TypeVar("Kind")


class Model(nn.Module):
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
        open_scorer: loads the model's scorer when it is first needed.
    """

    # Parts are found by their contracts (mllm.slots), not by their classes, so their static type is Any.
    encoder: Any
    connector: Any
    lm: Any
    tokens: Any
    decoder: Any
    spec: Any  # an AssemblySpec; its parts may be None

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
        open_scorer: Callable[[Model], Any],
    ) -> None:
        super().__init__()
        self.encoder, self.connector, self.lm = encoder, connector, lm
        self.adapters = nn.ModuleList(adapters)
        self.heads = nn.ModuleDict(heads)
        self.tokens, self.decoder = tokens, decoder
        self.spec = spec
        self.open_scorer = open_scorer
        self.source = self.fingerprint = ""  # of a loaded model: its folder, and a hash of its tensors and frozen parts
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

    def slot(self, name: str) -> nn.Module | None:
        """Return the part in a slot (``encoder``, ``connector``, ``lm``, ``decoder``), or None where it is absent."""
        return self._modules.get(name)

    def parts(self) -> Iterator[tuple[str, nn.Module]]:
        """Yield every part with its path: ``encoder``, ``adapters.0``, ``heads.NAME``, ..."""
        for name in ("encoder", "connector", "lm", "decoder"):
            if (part := self.slot(name)) is not None:
                yield name, part
        yield from ((f"adapters.{number}", adapter) for number, adapter in enumerate(self.adapters))
        yield from ((f"heads.{name}", head) for name, head in self.heads.items())

    def find_all(self, kind: type[Kind]) -> dict[str, Kind]:
        """Return the parts that are of a kind (`mllm.slots`), by their paths."""
        return {path: part for path, part in self.parts() if isinstance(part, kind)}

    def has(self, *kinds: type) -> bool:
        """Whether the model has a part of each kind (`mllm.slots`)."""
        return all(self.find_all(kind) for kind in kinds)

    def find(self, kind: type[Kind]) -> Kind:
        """Return the one part that is of a kind (`mllm.slots`).

        Raises:
            MLLMError: there is none, or there are several, which the message names.
        """
        candidates = self.find_all(kind)
        if not candidates:
            raise MLLMError(f"This model lacks a part: it needs {missing(kind)}.")
        if len(candidates) > 1:
            raise MLLMError(
                f"The model has several parts of the kind {kind.__name__}: {', '.join(candidates)}. Keep one of them."
            )
        return next(iter(candidates.values()))

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

    @contextlib.contextmanager
    def adapters_off(self) -> Iterator[None]:
        """Turn adapters and new tokens off: on text alone the outputs are then those of the bare language model."""
        with contextlib.ExitStack() as stack:
            for adapter in (*self.adapters, *([self.tokens] if self.tokens is not None else [])):
                stack.enter_context(cast(Any, adapter).off())
            yield

    def frozen_hash(self, part: str, without: Sequence[str] = ()) -> str:
        """Return a hash of all tensors of a part, without those of adapters inside it.

        Args:
            part: its slot.
            without: dotted paths of modules that train, whose tensors are excluded too.
        """
        adapted = {id(parameter) for parameter in self.adapters.parameters()}
        module = self.get_submodule(part)
        excluded = {name for name, p in module.named_parameters(remove_duplicate=False) if id(p) in adapted}
        excluded |= {name for name in module.state_dict() if _under(f"{part}.{name}", without)}
        return tensor_hash(module, without=excluded)

    def features(self, images: Sequence[Any]) -> Tensor:
        """Return the encoder's features ``(I, P, D_vis)`` of images in any accepted form."""
        pixels = self.encoder.preprocess([self.encoder.open(image) for image in images])
        with torch.no_grad():
            return self.encoder(pixels.to(self.device))

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
            features: ``(I, P, D_vis)`` of their images in order, or None; while the encoder trains, its inputs instead.
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
        """Return the tokens of the sequence per image."""
        if self.connector is None:
            return 0
        adapter = self.cross_attention
        return int(self.connector.num_tokens if adapter is None else adapter.tokens_per_image)

    def embed(self, visual: Tensor | None, batch: Batch) -> Any:
        """Return embeddings ``(B, T, D_lm)`` of the text, with visual tokens ``(I, Q, D_lm)`` at the image positions.

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
        encoded = encode(pieces, lm=self.lm, num_visual=self.tokens_per_image, start=start)
        limit = self.lm.context
        if limit is not None and len(encoded.ids) >= limit:
            raise MLLMError(
                f"The prompt has {len(encoded.ids)} tokens ({len(images_of(pieces))} images of "
                f"{self.tokens_per_image} tokens each), and the language model's context is {limit} tokens. Shorten it."
            )
        return encoded

    def prepare(self, prompts: Sequence[Sequence[Piece]]) -> tuple[Any, Batch]:
        """Return embeddings (see `embed`) and the padded batch of interleaved prompts."""
        return self.embedded(prompts, [self.encode(pieces) for pieces in prompts])

    @torch.no_grad()
    def embedded(self, prompts: Sequence[Sequence[Piece]], encoded: Sequence[Encoded]) -> tuple[Any, Batch]:
        """Return embeddings (see `embed`) and the padded batch of prompts that are already encoded."""
        batch = collate(encoded, self.lm.pad).to(self.device)
        images = [image for pieces in prompts for image in images_of(pieces)]
        visual = self.connector(self.features(images)) if images else None
        return self.embed(visual, batch), batch

    @functools.cached_property
    def scorer(self) -> Any:
        """Return the scorer, which is loaded when it is first needed; it is neither trained nor saved."""
        return self.open_scorer(self)

    def trained_state(self) -> dict[str, Tensor]:
        """Return copies on the CPU of all trained tensors, by dotted name."""
        return {name: tensor.detach().cpu() for name, tensor in self.trained_tensors().items()}

    def trained_tensors(self) -> dict[str, Tensor]:
        """Return all trained tensors by dotted name, on their device or the meta device."""
        adapted = {id(tensor) for tensor in self.adapters.state_dict(keep_vars=True).values()}
        return {
            name: tensor
            for name, tensor in self.state_dict(keep_vars=True).items()
            if name.split(".")[0] not in FROZEN or (_under(name, self.spec.trained) and id(tensor) not in adapted)
        }


def _under(name: str, paths: Sequence[str]) -> bool:
    """Whether a tensor's dotted name is inside one of the modules at these paths."""
    return any(f"{name}.".startswith(f"{path}.") for path in paths)


def trained_module(model: Model, path: str) -> nn.Module:
    """Return the module that a stage's ``train`` names by a dotted path.

    Raises:
        MLLMError: there is no such module.
    """
    try:
        module = model.get_submodule(path) if path else None
    except AttributeError:
        module = None
    if module is None:
        known = [name for name, _ in model.named_modules() if name]
        raise MLLMError(f"A stage's 'train' names {path!r}, which is not a part of the model. {near(path, known)}")
    return module
