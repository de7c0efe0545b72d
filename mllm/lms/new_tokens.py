"""Add new tokens to a language model: trained rows outside its frozen embedding tables, which are never resized.

Notable: a hook after the input embeddings inserts the rows of new ids, and a hook after the output embeddings appends
the logits of new tokens. So the logits of the original vocabulary are bit for bit those of the bare model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mllm.errors import MLLMError
from mllm.lms.adapting import Switchable


class NewTokens(Switchable):
    """Rows for new tokens in a language model of `transformers`: the only ones of its vocabulary that train.

    Args:
        model: the language model; it is hooked, not changed.
        names: of the tokens, such as ``[RET]``.

    Attributes:
        first: id of the first new token: the number of rows in the frozen table.
        rows: input embeddings ``(N, D_lm)``; also the output embeddings where the language model ties them.
        scores: output embeddings ``(N, D_lm)`` where they are not tied, else None.

    Raises:
        MLLMError: a name is given twice or is empty, or the model has no output embeddings.
    """

    def __init__(self, model: Any, names: Sequence[str]) -> None:
        super().__init__()
        if len(set(names)) != len(names) or not all(name.strip() for name in names):
            raise MLLMError(f"tokens: {list(names)}: expected distinct names, none of them empty.")
        table, head = model.get_input_embeddings(), model.get_output_embeddings()
        if head is None:
            raise MLLMError("tokens: this language model has no output embeddings, so it cannot generate new tokens.")
        self.names, self.first = list(names), int(table.weight.shape[0])
        self.rows = nn.Parameter(_start(table.weight, len(names)))
        tied = head.weight.data_ptr() == table.weight.data_ptr() or head.weight.is_meta
        self.scores = None if tied else nn.Parameter(_start(head.weight, len(names)))
        self._norm = 1.0 if table.weight.is_meta else float(table.weight.detach().float().norm(dim=-1).mean())
        table.register_forward_pre_hook(self._replace_new_ids)
        table.register_forward_hook(self._look_up)
        head.register_forward_hook(self._score)
        self._new: Tensor | None = None

    def ids(self) -> dict[str, int]:
        """Return name -> id."""
        return {name: self.first + index for index, name in enumerate(self.names)}

    @torch.no_grad()
    def rescale(self) -> None:
        """Scale each row to the mean norm of the frozen ones, as FROMAGe (arXiv:2301.13823) does after a step.

        Tokens whose rows are longer would be generated too often.
        """
        self.rows.mul_(self._norm / self.rows.norm(dim=-1, keepdim=True).clamp(min=1e-12))

    def _replace_new_ids(self, table: nn.Module, args: Any) -> Any:
        """Remember which ids are new, and look up id 0 instead of them."""
        (ids,) = args
        new = ids >= self.first
        self._new = (ids - self.first).clamp(min=0).where(new, -1) if bool(new.any()) else None
        return (ids.where(~new, 0),) if self._new is not None else None

    def _look_up(self, table: nn.Module, args: Any, embeds: Tensor) -> Tensor:
        if self._new is None:
            return embeds
        rows = self.rows[self._new.clamp(min=0)].to(embeds.dtype) * float(getattr(table, "scalar_embed_scale", 1.0))
        return torch.where((self._new >= 0).unsqueeze(-1), rows, embeds)

    def _score(self, head: nn.Module, args: Any, logits: Tensor) -> Tensor:
        if not self.on:
            return logits
        rows = self.rows if self.scores is None else self.scores
        return torch.cat([logits, args[0] @ rows.to(args[0].dtype).T], dim=-1)


def _start(table: Tensor, number: int) -> Tensor:
    """Sample rows from a normal distribution with the mean and standard deviation of the table's rows."""
    if table.is_meta:
        return torch.empty(number, table.shape[1], device="meta")
    some = table[: min(len(table), 8192)].detach().float()
    return some.mean(0) + some.std(0) * torch.randn(number, table.shape[1]).to(table.device)
