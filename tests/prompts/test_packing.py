"""Several examples in a row: what is learnt is what they teach alone, or it is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import mllm
from mllm.errors import MLLMError
from mllm.prompts.batch import IGNORED, Encoded, collate
from mllm.prompts.pieces import Target
from mllm.testing import tiny_image
from mllm.testing.lms import LM_FAMILIES

EXAMPLES = [
    [tiny_image(0), "A picture of", Target(" a dog")],
    [tiny_image(1), "it and", tiny_image(2), "What?", Target(" two cats on a mat"), "\n", "And?", Target(" no")],
    [Target("text alone")],
    [tiny_image(3), "A picture of", Target(" a bus")],
    ["Question: 1 + 1? Answer:", Target(" 2")],
]


def losses(model: Any, pack: int | None) -> torch.Tensor:
    """Return each target's loss, of images' and language model's own values."""
    encoded = [model.encode(pieces) for pieces in EXAMPLES]
    batch = collate(encoded, model.lm.pad, pack=pack)
    visual = torch.randn(4, 4, model.lm.dim, generator=torch.Generator().manual_seed(0))
    return model.lm.losses(model.embed(visual, batch), batch.mask, batch.labels)


@pytest.mark.parametrize("pack", [8, 60, 90, 1000])
def test_the_packed_loss_is_the_unpacked_one(tiny_model: Callable[..., Any], pack: int) -> None:
    model = tiny_model({"type": "linear", "tokens": 4}, adapters=[{"type": "lora", "r": 2}])
    torch.testing.assert_close(losses(model, pack), losses(model, None), atol=1e-5, rtol=1e-5)


def test_rows_are_filled_in_order_and_made_even() -> None:
    rows = [Encoded([1] * length, [False] * length, [IGNORED] * length) for length in (5, 3, 4, 2, 6, 1, 1)]
    batch = collate(rows, 0, pack=12)
    assert batch.ids.shape == (2, 12) and batch.ids.sum(1).tolist() == [12, 10]
    assert collate(rows[:4], 0, pack=12).ids.shape == (2, 8)  # 5 + 3 and 4 + 2, not 12 and 2
    assert collate(rows, 0, pack=2).ids.shape == (5, 6)  # the longest prompt is not cut
    seen = collate(rows[:2], 0, pack=10).mask[0]
    assert torch.equal(seen, torch.block_diag(torch.ones(5, 5), torch.ones(3, 3)).tril().bool())


@pytest.mark.parametrize("family", sorted(LM_FAMILIES))
def test_every_family_packs_exactly_or_refuses(family: str, tmp_path: Path, tiny_parts: tuple[str, str]) -> None:
    model = mllm.assemble(tiny_parts[0], LM_FAMILIES[family](tmp_path / "lm"), {"type": "linear", "tokens": 4})
    if model.lm.can_pack():
        torch.testing.assert_close(losses(model, 90), losses(model, None), atol=1e-5, rtol=1e-4)
    assert model.lm.can_pack() or family not in ("llama", "gpt2", "opt"), "a family that is known to"


def test_a_run_that_cannot_pack_says_so(tmp_path: Path, tiny_parts: tuple[str, str]) -> None:
    lm = LM_FAMILIES["bloom"](tmp_path / "lm")
    tiny_image().save(tmp_path / "0.png")
    (tmp_path / "t.jsonl").write_text('{"image": "0.png", "caption": "x"}')
    (tmp_path / "r.yaml").write_text(f"""name: packed
encoder: {{model: {tiny_parts[0]}}}
lm: {{model: {lm}}}
connector: {{type: linear}}
data: {{pack: 64, train: {{format: table, path: {tmp_path}/t.jsonl}}}}
stages: [{{name: align, train: [connector], steps: 1, batch_size: 1}}]
""")
    with pytest.raises(MLLMError, match=r"data\.pack: in this language model .* Leave data.pack out"):
        mllm.train(str(tmp_path / "r.yaml"), out=tmp_path / "run")
