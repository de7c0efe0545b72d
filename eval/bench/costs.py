"""Count the FLOPs of a training step: two for a multiply-add, and no weight gradients of frozen parts."""

from __future__ import annotations

from dataclasses import dataclass

from mllm.eval.bench.setups import Setup

from mllm.model import Model


@dataclass(frozen=True)
class Shape:
    """Sizes of one example and of the parts.

    Attributes:
        vision: number of the encoder's weights.
        patches: P, including the class token.
        body: number of the language model's weights without embeddings and output layer.
        vocabulary: number of the output layer's weights.
        attention: layers times width of the language model.
        visual: Q, visual tokens per image.
        tokens: sequence length of an example.
        targets: target tokens of an example.
    """

    vision: int
    patches: int
    body: int
    vocabulary: int
    attention: int
    visual: int
    tokens: int
    targets: int

    @property
    def encoder(self) -> int:
        """FLOPs of the encoder for one image, without attention."""
        return 2 * self.vision * self.patches

    @property
    def language(self) -> int:
        """FLOPs of the body for one example: forward, and backward to its inputs only; attention is causal.

        Each weight takes two FLOPs per token forward and two backward. Attention has two products of half of
        T x T x width forward, and four backward.
        """
        return 4 * self.body * self.tokens + 6 * self.attention * self.tokens**2

    def logits(self, tokens: int) -> int:
        """FLOPs of the output layer for so many tokens, forward and backward."""
        return 4 * self.vocabulary * tokens

    def step(self) -> int:
        """FLOPs of one of our examples with cached features."""
        return self.language + self.logits(self.targets)

    def bound(self, *, cached: bool) -> float:
        """Return the upper bound of our speedup."""
        theirs = self.encoder + self.language + self.logits(self.tokens)
        return theirs / (self.step() + (0 if cached else self.encoder))


def shape_of(model: Model, made: Setup) -> Shape:
    """Return the sizes of a model and its examples."""
    table = model.lm.model.get_output_embeddings().weight
    config = model.lm.model.config.get_text_config()
    inputs = model.lm.model.get_input_embeddings().weight
    total = sum(parameter.numel() for parameter in model.lm.model.parameters())
    body = total - table.numel() - (0 if inputs is table else inputs.numel())
    return Shape(
        vision=sum(parameter.numel() for parameter in model.encoder.parameters()),
        patches=model.encoder.num_patches + 1,
        body=body,
        vocabulary=table.numel(),
        attention=config.num_hidden_layers * config.hidden_size,
        visual=model.tokens_per_image,
        tokens=made.tokens,
        targets=made.targets,
    )
