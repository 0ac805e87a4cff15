"""How ranks know of each other whether they are well, and how far they are."""

from __future__ import annotations

from enum import IntEnum
from threading import Condition, Thread

from .connections import Connections, Store

__all__ = ["Heartbeat"]

#: How often a rank that is at work takes part, in seconds; one that waits for others does so whenever they do.
_EVERY = 1.0


class _State(IntEnum):
    """How a rank is."""

    WELL = 0
    FAILED = 1
    LEAVING = 2


class Heartbeat:
    """Rounds in which each rank tells all others how it is, in a thread of its own.

    They end with the first in which a rank has failed, or from which one is missing, or in which all are leaving. All
    ranks end with the same one, unless one is lost: the others find that in turn.

    Args:
        store: By which the ranks connect; for this alone.
        rank: Which one this is.
        size: How many there are.

    Attributes:
        is_over: Whether there are no more rounds.
        loss: What the library says of a rank that is missing.

    Raises:
        RuntimeError: if the ranks cannot connect.
    """

    def __init__(self, store: Store, rank: int, size: int) -> None:
        self._connections = Connections(store, rank, size)
        self._step, self._state = 0, _State.WELL
        self._slowest = 0
        self.is_over = False
        self.loss: RuntimeError | None = None
        self._changed = Condition()
        self._thread = Thread(target=self._beat, name="ckptsurg-heartbeat", daemon=True)
        self._thread.start()

    def step(self) -> bool:
        """Come to the next step and wait until all ranks have; False if there are no more rounds."""
        with self._changed:
            self._step += 1
            self._changed.notify_all()
            self._changed.wait_for(lambda: self.is_over or self._slowest >= self._step)
            return not self.is_over

    def fail(self) -> None:
        """Have the others told that this rank has failed."""
        self._become(_State.FAILED)

    def end(self) -> None:
        """Leave when all do, or at once where one has failed."""
        self._become(_State.LEAVING)
        self._thread.join()  # a thread that outlives the interpreter would bring it down

    def _become(self, state: _State) -> None:
        with self._changed:
            if self._state is _State.WELL:
                self._state = state
            self._changed.notify_all()

    def _beat(self) -> None:
        try:
            while not self.is_over:
                self._round()
        finally:
            with self._changed:
                self.is_over = True
                self._changed.notify_all()
            self._connections.close()  # who waits for this one sees it at once, whatever it is at

    def _round(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._state is not _State.WELL or self._step > self._slowest, _EVERY)
            told = (self._step, self._state)
        try:
            heard = self._connections.numbers(told)
        except RuntimeError as failure:
            self.loss, self.is_over = failure, True
            return
        steps, states = zip(*heard, strict=True)
        with self._changed:
            self._slowest = min(steps)
            self.is_over = _State.FAILED in states or set(states) == {_State.LEAVING}
            self._changed.notify_all()
