"""Build the encoder that a recipe specifies, and how it cuts images into tiles."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from mllm.config.parts import EncoderSpec
from mllm.config.tiles import AnyResolutionSpec, DynamicResolutionSpec, TilesSpec
from mllm.devices import cast, dtype_of, forked_rng
from mllm.encoders.base import Shape, on_meta
from mllm.errors import MLLMError
from mllm.hub import published
from mllm.media.tiles import Tiling
from mllm.media.tilings import AnyResolution, DynamicResolution, Split
from mllm.registry import fulfilled, lookup, made
from mllm.slots import Connector, Encoder

Runs = Callable[[Any, dict[str, Any]], dict[str, Any]]  # a class and its options, to the options with runs loaded


def encoder_of(spec: EncoderSpec, *, seed: int, runs: Runs = lambda cls, options: options) -> Encoder:
    """Return the encoder of an `mllm.config.parts.EncoderSpec`; the encoders in its ``of`` are built first.

    Args:
        spec: the specification.
        seed: of random weights.
        runs: loads the runs that an encoder's options name.

    Raises:
        MLLMError: an unknown type or argument, or a model that cannot be loaded.
    """
    if spec.tiles is not None:
        whole = encoder_of(spec.model_copy(update={"tiles": None, "resize": "stretch"}), seed=seed, runs=runs)
        whole.tiling = _tiling(spec.tiles, whole, spec.resolution)
        return whole
    config = (published.configuration(spec.model) if spec.model else None) or {}
    if on_meta() and config.pop("model_type", None) == "shape":
        return Shape(**config)
    options = spec.options()
    if spec.of is not None:
        options["of"] = [_member(member, seed, runs) for member in spec.of]
    else:
        options["seed"] = seed
    label, cls = f"encoder {spec.model or spec.type}", lookup("encoders", spec.type)
    encoder = fulfilled(Encoder, label, made(cls, label, **runs(cls, options)))
    if spec.dtype != "auto":
        cast(encoder, dtype_of(spec.dtype))
    return encoder


def _member(spec: EncoderSpec, seed: int, runs: Runs) -> Encoder:
    """Return an encoder inside another one.

    Raises:
        MLLMError: its images do not all have one number of features.
    """
    encoder = encoder_of(spec, seed=seed, runs=runs)
    if encoder.tiling is not None:
        raise MLLMError(
            f"encoder.of: {spec.label} gives images of different sizes different numbers of features, and an encoder "
            "in 'of' has to give as many for each. Choose an encoder of type transformers."
        )
    return encoder


def cut_for(encoder: Encoder, connector: Connector) -> None:
    """Let an encoder and a connector agree on the tokens of an image, where their number varies.

    Raises:
        MLLMError: the connector reads a fixed number of features, or a token budget is too small.
    """
    if encoder.tiling is None:
        return
    encoder.tiling = encoder.tiling.within(connector.num_tokens)
    connector.padded = connector.reads_whole and encoder.tiling.joint
    if encoder.tiling.joint and not connector.reads_whole and connector.token_grid is None:
        raise MLLMError(
            f"The connector {type(connector).__name__} reads a fixed number of features, and this encoder gives "
            "as many as an image's size asks for. Set connector.type to linear, mlp, resampler, qformer, or mapper "
            "without positions."
        )


def _tiling(spec: TilesSpec, encoder: Any, resolution: int | None) -> Tiling:
    """Return how images are cut into tiles of the encoder's input size.

    Raises:
        MLLMError: the encoder's input is no square image.
    """
    shape = encoder.shape or (3, resolution, resolution)  # of an encoder of which only the shape is known
    if len(shape) != 3 or shape[1] != shape[2] or shape[1] is None:
        raise MLLMError(
            f"encoder.tiles cuts square tiles, and this encoder's input has the shape {tuple(shape)}. Leave out "
            "encoder.tiles, set encoder.resolution, or take another encoder."
        )
    side, resample = int(shape[1]), getattr(encoder, "resample", None)
    if isinstance(spec, AnyResolutionSpec):
        return AnyResolution(side, resample, tuple(spec.choices), spec.unpad, spec.limit)
    if isinstance(spec, DynamicResolutionSpec):
        return DynamicResolution(side, resample, spec.least, spec.most)
    return Split(side, resample, spec.longest)


def newline_for(encoder: Encoder, connector: Connector, lm_dim: int | None, *, seed: int) -> nn.Parameter | None:
    """Return a new newline token ``(D_lm,)`` where the encoder's tiles are put in rows; None: they are not.

    Raises:
        MLLMError: the connector's tokens form no rows.
    """
    if lm_dim is None or not isinstance(encoder.tiling, AnyResolution) or not encoder.tiling.unpad:
        return None
    if connector.token_grid is None:
        raise MLLMError(
            "encoder.tiles removes the padding of tiles row by row, and the connector's visual tokens form no grid "
            "(linear and mlp keep that of the patches). Set encoder.tiles.unpad=false, or another connector."
        )
    with forked_rng(seed):
        return nn.Parameter(torch.randn(lm_dim) / lm_dim**0.5)
