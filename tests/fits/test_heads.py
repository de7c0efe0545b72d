"""The closed-form fit of the retrieval head is a canonical correlation analysis of its two sides."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch

import mllm
from mllm.data.items import Item
from mllm.errors import MLLMError
from mllm.fits.base import Material
from mllm.fits.regression import Correlation
from mllm.fits.retrieval import RetrievalFit
from mllm.media.images import source_of
from mllm.planning.check import problems
from mllm.readout.states import read_texts
from mllm.testing import tiny_image

PARTS: dict[str, Any] = {"heads": [{"type": "retrieval", "dim": 6}], "tokens": ["[RET]"]}


def pairs():
    """Return two sides of 200 rows that share three directions, with noise."""
    draw = torch.Generator().manual_seed(0)
    common = torch.randn(200, 3, generator=draw, dtype=torch.float64)
    mixed = [common @ torch.randn(3, width, generator=draw, dtype=torch.float64) for width in (8, 5)]
    return [side + 0.5 * torch.randn(*side.shape, generator=draw, dtype=torch.float64) + 3 for side in mixed]


def test_correlations_are_the_cosines_between_the_two_sides_spaces():
    x, y = pairs()
    sums = Correlation(8, 5)
    for start in range(0, 200, 64):
        sums.add(x[start : start + 64], y[start : start + 64])
    maps = sums.solve(7, 1e-9)
    bases = [torch.linalg.qr(side - side.mean(0))[0] for side in (x, y)]  # Bjorck and Golub's algorithm
    expected = torch.linalg.svdvals(bases[0].T @ bases[1])
    torch.testing.assert_close(maps.correlations, expected, atol=1e-6, rtol=1e-6)
    a, b = x @ maps.x.T + maps.x_bias, y @ maps.y.T + maps.y_bias
    assert a.shape == b.shape == (200, 7) and not a[:, 5:].any()  # y has five directions
    torch.testing.assert_close((a.T @ a / 200).diagonal()[:5], expected**2, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close((a.T @ b / 200).diagonal()[:5], expected**3, atol=1e-6, rtol=1e-6)
    others = Correlation(x.shape[1], y.shape[1])
    x, y = torch.randn(50, x.shape[1], dtype=torch.float64), torch.randn(50, y.shape[1], dtype=torch.float64)
    others.add(x, y)
    sides = [(x @ maps.x.T).numpy(), (y @ maps.y.T).numpy()]
    correlations = [np.corrcoef(sides[0][:, number], sides[1][:, number])[0, 1] for number in range(5)]
    assert others.correlations(maps).tolist() == pytest.approx(correlations)


@torch.no_grad()
def test_a_fitted_head_retrieves_the_images_it_was_fitted_on(tiny_model):
    model = tiny_model(**PARTS)
    items = [Item(str(n), (source_of(tiny_image(n)),), (f"thing {n * n}",)) for n in range(12)]
    question = Item("question", items[0].images, ("yes",), question="Is it?")
    frozen = {name: tensor.clone() for name, tensor in model.trained_state().items() if not name.startswith("heads.")}
    fit = RetrievalFit(part="heads.retrieval", solver="correlation", strength=1e-3, chunk=5)
    correlation = fit(model, Material([*items, question], model.features))
    assert -1 <= correlation <= 1
    head = model.heads["retrieval"]
    texts = head.of_states(read_texts(model, [f" {item.answers[0]}" for item in items])[0][:, 0])
    images = head.of_features(model.features([item.images[0] for item in items]))
    assert ((texts @ images.T).argmax(1) == torch.arange(12)).float().mean() > 0.7  # at random 1 in 12
    assert all(torch.equal(tensor, model.trained_state()[name]) for name, tensor in frozen.items())
    with pytest.raises(MLLMError, match="only questions"):
        fit(model, Material([question], model.features))


def test_it_is_a_stage(tiny_parts, tiny_model, tmp_path):
    for number in range(8):
        tiny_image(number).save(tmp_path / f"{number}.png")
    rows = [{"image": f"{number}.png", "caption": f"thing {number}"} for number in range(8)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    recipe = tmp_path / "find.yaml"
    recipe.write_text(
        f"name: find\nencoder: {{model: {tiny_parts[0]}}}\nlm: {{model: {tiny_parts[1]}}}\n"
        "connector: {type: linear}\nheads: [{type: retrieval, dim: 6}]\ntokens: ['[RET]']\n"
        f"data: {{train: {{format: table, path: {tmp_path}/rows.json}}}}\n"
        "stages: [{name: find, fit: {part: heads.retrieval, solver: correlation}}]\n"
    )
    assert problems(str(recipe)) == []
    run = mllm.train(str(recipe), out=tmp_path / "run")
    assert "correlation" in json.loads((run.path / "log.jsonl").read_text().splitlines()[-1])
    before, after = tiny_model(**PARTS).trained_state(), mllm.load(run.path).trained_state()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"heads.retrieval.{side}.{kind}" for side in ("text", "image") for kind in ("weight", "bias")}
    assert problems(str(recipe), {"tokens": []}) == []  # the head's token is added by itself
    (wrong,) = problems(str(recipe), {"stages.0.fit.solver": "ridge"})
    assert "heads.retrieval has solver 'ridge': expected correlation" in wrong
    (wrong,) = problems(str(recipe), {"stages.0.fit.targets": "sentences"})
    assert "fit of heads.retrieval does not take" in wrong and "targets" in wrong
    (wrong,) = problems(str(recipe), {"stages.0.fit.part": "heads.retrievel"})
    assert "retrievel" in wrong and "Did you mean 'retrieval'" in wrong
