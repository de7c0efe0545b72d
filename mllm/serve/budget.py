"""Share an amount between requests: the bytes of their bodies, the pixels of their images, their places."""

from __future__ import annotations

from collections import deque
from types import TracebackType

import anyio


class Budget:
    """An amount that requests share; used from the event loop alone.

    Args:
        total: the amount.

    Attributes:
        total: the amount.
        used: how much of it requests have.
    """

    def __init__(self, total: int) -> None:
        self.total, self.used = total, 0
        self._waiting: deque[tuple[int, anyio.Event]] = deque()

    def share(self) -> Share:
        """Return an empty share, which a request fills."""
        return Share(self)

    def take(self, amount: int) -> bool:
        """Take an amount if it is left and nobody waits; whether it was taken."""
        if self._waiting or self.used + amount > self.total:
            return False
        self.used += amount
        return True

    async def wait(self, amount: int) -> None:
        """Take an amount of at most the total when it is left, first come, first served."""
        if self.take(amount):
            return
        turn = amount, anyio.Event()
        self._waiting.append(turn)
        try:
            await turn[1].wait()
        except anyio.get_cancelled_exc_class():
            if turn in self._waiting:
                self._waiting.remove(turn)
                amount = 0
            self.give_back(amount)
            raise

    def give_back(self, amount: int) -> None:
        """Give back an amount that was taken, to those who wait."""
        self.used -= amount
        while self._waiting and self.used + self._waiting[0][0] <= self.total:
            amount, turn = self._waiting.popleft()
            self.used += amount
            turn.set()


class Share:
    """What one request has of a budget; as a context manager it is given back at the end.

    Args:
        budget: which it is a share of.
    """

    def __init__(self, budget: Budget) -> None:
        self._budget, self._amount = budget, 0

    def take(self, amount: int) -> bool:
        """Take an amount if it is left; whether it was taken."""
        taken = self._budget.take(amount)
        self._amount += amount if taken else 0
        return taken

    async def wait(self, amount: int) -> None:
        """Take an amount when it is left."""
        await self._budget.wait(amount)
        self._amount += amount

    def give_back(self) -> None:
        """Give all of it back."""
        amount, self._amount = self._amount, 0
        self._budget.give_back(amount)

    def __enter__(self) -> Share:
        """Return the share."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Give all of it back."""
        self.give_back()
