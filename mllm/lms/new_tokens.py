"""New tokens: rows of their own beside the language model's frozen tables, which are never resized.

Notable: two hooks. Behind the input table the new ids' rows are put in; behind the output table the new rows' scores
are appended. So the original columns are the very numbers of the bare model, whatever its code does with them next.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mllm.errors import MLLMError
from mllm.lms.adapting import Switched


class NewTokens(Switched):
    """Rows for new tokens in a language model of `transformers`: the only ones of its vocabulary that train.

    Args:
        model: the language model; it is hooked, not changed.
        names: of the tokens, such as ``[RET]``.

    Attributes:
        first: id of the first new token: the number of rows in the frozen table.
        rows: input embeddings ``(N, D_lm)``; also the output ones where the language model's two tables are tied.
        scores: output embeddings ``(N, D_lm)`` where they are not tied, else None.

    Raises:
        MLLMError: a name twice, an empty one, or a model without a table of output embeddings.
    """

    def __init__(self, model: Any, names: Sequence[str]) -> None:
        super().__init__()
        if len(set(names)) != len(names) or not all(name.strip() for name in names):
            raise MLLMError(f"tokens: {list(names)}: expected names that differ, none of them empty.")
        table, head = model.get_input_embeddings(), model.get_output_embeddings()
        if head is None:
            raise MLLMError("tokens: this language model has no table of output embeddings, so it cannot say new ones.")
        self.names, self.first = list(names), int(table.weight.shape[0])
        self.rows = nn.Parameter(_start(table.weight, len(names)))
        tied = head.weight.data_ptr() == table.weight.data_ptr() or head.weight.is_meta
        self.scores = None if tied else nn.Parameter(_start(head.weight, len(names)))
        norms = 1.0 if table.weight.is_meta else float(table.weight.detach().float().norm(dim=-1).mean())
        self._length = norms  # of a frozen row, on average
        table.register_forward_pre_hook(self._known)
        table.register_forward_hook(self._look_up)
        head.register_forward_hook(self._score)
        self._new: Tensor | None = None

    def ids(self) -> dict[str, int]:
        """Return name -> id."""
        return {name: self.first + place for place, name in enumerate(self.names)}

    @torch.no_grad()
    def rescale(self) -> None:
        """Give each row the mean length of the frozen ones, as FROMAGe (arXiv:2301.13823) does after a step.

        Longer rows would be said too readily.
        """
        self.rows.mul_(self._length / self.rows.norm(dim=-1, keepdim=True).clamp(min=1e-12))

    def _known(self, table: nn.Module, args: Any) -> Any:
        """Keep which ids are new, and let the table look up one that it has in their place."""
        (ids,) = args
        new = ids >= self.first
        self._new = (ids - self.first).clamp(min=0).where(new, -1) if bool(new.any()) else None
        return (ids.where(~new, 0),) if self._new is not None else None

    def _look_up(self, table: nn.Module, args: Any, found: Tensor) -> Tensor:
        if self._new is None:
            return found
        rows = self.rows[self._new.clamp(min=0)].to(found.dtype) * float(getattr(table, "scalar_embed_scale", 1.0))
        return torch.where((self._new >= 0).unsqueeze(-1), rows, found)

    def _score(self, head: nn.Module, args: Any, logits: Tensor) -> Tensor:
        if not self.on:
            return logits
        rows = self.rows if self.scores is None else self.scores
        return torch.cat([logits, args[0] @ rows.to(args[0].dtype).T], dim=-1)


def _start(table: Tensor, number: int) -> Tensor:
    """Draw rows about the table's mean row with its spread."""
    if table.is_meta:
        return torch.empty(number, table.shape[1], device="meta")
    some = table[: min(len(table), 8192)].detach().float()
    return some.mean(0) + some.std(0) * torch.randn(number, table.shape[1], device=table.device)
