"""Build the closed-form fit of a stage."""

from __future__ import annotations

from mllm.config.recipe import Stage
from mllm.fits.base import ClosedForm
from mllm.registry import lookup, made


def fit_of(stage: Stage) -> ClosedForm:
    """Return the closed-form fit of a stage, which is found by the type of the part that it fits.

    Raises:
        MLLMError: a part that the stage does not have or that has no closed form, or an option that it does not take.
    """
    assert stage.fit is not None
    path = stage.fit.part
    types = {"connector": "connector", **{f"heads.{head.name}": head.type for head in stage.heads}}
    if stage.encoder is not None:
        types["encoder.project"] = stage.encoder.type
    name = types.get(path, path.removeprefix("heads."))
    fit: ClosedForm = made(lookup("fits", name), f"fit of {path}", part=path, **stage.fit.options())
    return fit
