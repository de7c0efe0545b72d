"""Building a model: what another package registers is held to the contract of its slot."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
from torch import nn

import mllm
from mllm import registry
from mllm.errors import MLLMError


class Foreign(nn.Module):
    """A module that fulfils no contract, whatever it is given."""

    def __init__(self, **options: Any) -> None:
        super().__init__()


@pytest.mark.parametrize(
    ("group", "part", "contract"),
    [
        ("encoders", {"encoder": {"type": "foreign"}}, "Encoder"),
        ("connectors", {"connector": {"type": "foreign"}}, "Connector"),
        ("heads", {"heads": [{"type": "foreign"}]}, "Head"),
    ],
)
def test_a_part_that_breaks_its_contract_is_refused_by_name(
    group: str, part: dict[str, Any], contract: str, tiny_parts: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = ModuleType("foreign")
    monkeypatch.setattr(module, "Foreign", Foreign, raising=False)
    monkeypatch.setitem(sys.modules, "foreign", module)
    monkeypatch.setitem(registry.table(group), "foreign", "foreign:Foreign")
    with pytest.raises(MLLMError, match=rf"foreign is a Foreign, and not an mllm\.slots\.{contract}: inherit"):
        mllm.assemble(**{"encoder": tiny_parts[0], "lm": tiny_parts[1], **part})
