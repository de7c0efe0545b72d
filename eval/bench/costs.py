"""What a training step takes by arithmetic: multiply-adds count two, what is frozen has no gradient of its weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mllm.eval.bench.setups import Setup


@dataclass(frozen=True)
class Shape:
    """Sizes of one example and of the parts.

    Attributes:
        vision: the encoder's weights.
        patches: P, the class token included.
        body: the language model's weights without vocabulary.
        vocabulary: weights of the map to the vocabulary.
        attention: layers times width of the language model.
        visual: Q.
        positions: of an example.
        targets: of an example.
    """

    vision: int
    patches: int
    body: int
    vocabulary: int
    attention: int
    visual: int
    positions: int
    targets: int

    @property
    def encoder(self) -> int:
        """FLOPs of the encoder for one image; attention left out."""
        return 2 * self.vision * self.patches

    @property
    def language(self) -> int:
        """FLOPs of the body for one example: forward, and backward to its inputs only; attention sees what is before.

        Each weight takes two FLOPs a position forward and two backward. Attention has two products of half of
        T x T x width forward, and four backward.
        """
        return 4 * self.body * self.positions + 6 * self.attention * self.positions**2

    def logits(self, positions: int) -> int:
        """FLOPs of the vocabulary at so many positions, forward and backward."""
        return 4 * self.vocabulary * positions

    def step(self) -> int:
        """FLOPs of one example of ours whose features are cached."""
        return self.language + self.logits(self.targets)

    def bound(self, *, cached: bool) -> float:
        """Return how many times faster ours can be."""
        theirs = self.encoder + self.language + self.logits(self.positions)
        return theirs / (self.step() + (0 if cached else self.encoder))


def shape_of(model: Any, made: Setup) -> Shape:
    """Return the sizes of an assembly and its examples."""
    table = model.lm.model.get_output_embeddings().weight
    config = model.lm.model.config.get_text_config()
    inputs = model.lm.model.get_input_embeddings().weight
    total = sum(parameter.numel() for parameter in model.lm.model.parameters())
    own = total - table.numel() - (0 if inputs is table else inputs.numel())
    return Shape(
        vision=sum(parameter.numel() for parameter in model.encoder.parameters()),
        patches=model.encoder.num_patches + 1,
        body=own,
        vocabulary=table.numel(),
        attention=config.num_hidden_layers * config.hidden_size,
        visual=model.tokens_per_image,
        positions=made.positions,
        targets=made.targets,
    )
