"""Count the FLOPs that a training step has use for, as a plan does: by its code, on tensors without values."""

from __future__ import annotations

from dataclasses import dataclass

from mllm.config.recipe import Stage
from mllm.devices import forked_rng
from mllm.planning.draft import Draft
from mllm.planning.workload import Rows
from mllm.prompts.batch import Batch
from mllm.prompts.pieces import Piece, images_of


@dataclass(frozen=True)
class StepFlops:
    """FLOPs of a stage's steps; a multiply-add counts as two, and what is recomputed counts once.

    Through a frozen language model of N weights a token takes 4 N, forward and for the gradient of its input; where
    they train, 6 N.

    Attributes:
        each: of a token with all that is computed for it in a step, the connector included; of an example where there
            is no language model.
        tile: of the frozen encoder, forward, for one tile.
    """

    each: float
    tile: float


def step_flops(stage: Stage, pieces: list[list[Piece]], batch: Batch | None) -> StepFlops:
    """Return the FLOPs of a stage's steps, as those of a batch; it need not have values on this device.

    Args:
        stage: what trains, and by which objectives.
        pieces: the examples of the batch.
        batch: their ids ``(B, T)``, on the CPU.
    """
    plain = stage.optim.model_copy(update={"checkpointing": False, "compile": False})
    with forked_rng():
        draft = Draft(stage.model_copy(update={"optim": plain}), "gpu")
        cost = draft.step(Rows(pieces, batch, sum(len(images_of(row)) for row in pieces)))
        image = 0 if draft.model.encoder_trains else draft.image.flops
    units = len(pieces) if batch is None else batch.ids.numel()
    return StepFlops(cost.flops / units, image / max(1, draft.model.tiles_per_image))
