"""Skip samples that cannot be read and log them; stop the run if they are more than a share of all samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from mllm.data.files import some
from mllm.errors import MLLMError

Member = TypeVar("Member")


class Skipped:
    """The samples that could not be read so far.

    Args:
        share: the share of ``total`` samples that may be skipped.
        total: the number of samples.
        log: called once for each skipped sample, with ``skipped=REASON``.
    """

    def __init__(self, share: float, total: int, log: Callable[..., None]) -> None:
        self._share, self._total, self._log = share, total, log
        self._reasons: dict[str, None] = {}

    def readable(self, members: Sequence[Member], read: Callable[[Member], Any]) -> list[Member]:
        """Return the members for which ``read`` raises no `MLLMError`.

        Raises:
            MLLMError: more than the share has been skipped, or no member can be read.
        """
        readable = []
        for member in members:
            try:
                read(member)
                readable.append(member)
            except MLLMError as error:
                self.note(str(error))
        if not readable:
            raise MLLMError(
                f"None of {len(members)} samples in a row could be read: {some(list(self._reasons))}. Expected some: "
                "see `mllm data check`."
            )
        return readable

    def note(self, reason: str) -> None:
        """Skip a sample for a reason.

        Raises:
            MLLMError: more than the share has been skipped.
        """
        if reason in self._reasons:
            return
        self._reasons[reason] = None
        self._log(skipped=reason)
        if len(self._reasons) > self._share * self._total:
            listed = "".join(f"\n  {reason}" for reason in self._reasons)
            raise MLLMError(
                f"{len(self._reasons)} of {self._total} samples could not be read, more than data.skip={self._share} "
                f"allows. `mllm data check` lists all of them.{listed}"
            )
