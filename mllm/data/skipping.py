"""Samples that cannot be read: left out, named in the run's log, and past a share of all of them the run stops."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from mllm.data.files import some
from mllm.errors import MLLMError

Member = TypeVar("Member")


class Skipped:
    """What could not be read so far.

    Args:
        share: of ``total`` items that may be left out.
        total: the items there are.
        log: is given what was left out, ``skipped=...``, each once.
    """

    def __init__(self, share: float, total: int, log: Callable[..., None]) -> None:
        self._share, self._total, self._log = share, total, log
        self._known: dict[str, None] = {}

    def readable(self, members: Sequence[Member], read: Callable[[Member], Any]) -> list[Member]:
        """Return those that ``read`` raises no `MLLMError` for.

        Raises:
            MLLMError: more than the share was left out by now, or nothing is left.
        """
        kept = []
        for member in members:
            try:
                read(member)
                kept.append(member)
            except MLLMError as error:
                self._note(str(error))
        if not kept:
            raise MLLMError(f"None of {len(members)} samples in a row could be read: {some(list(self._known))}")
        return kept

    def _note(self, reason: str) -> None:
        if reason in self._known:
            return
        self._known[reason] = None
        self._log(skipped=reason)
        if len(self._known) > self._share * self._total:
            listed = "".join(f"\n  {reason}" for reason in self._known)
            raise MLLMError(
                f"{len(self._known)} of {self._total} samples could not be read, more than the share data.skip="
                f"{self._share} allows. `mllm data check` lists all.{listed}"
            )
