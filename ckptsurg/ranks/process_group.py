"""The ranks of a process group of ``torch.distributed``, which speak over Gloo."""

from __future__ import annotations

import atexit
import json
import pickle
import socket
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from hashlib import sha256
from types import TracebackType
from typing import Self, TypeVar, cast

import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from ..errors import CkptsurgError, PeerFailed, SystemFailure, UsageError
from ..metering import Progress
from ..wording import shown
from .connections import Connections, Store, part_of
from .heartbeat import Heartbeat
from .meeting import LOOK_EVERY, START, TOGETHER, meet

__all__ = ["ProcessGroupRanks", "joined"]

#: What is in the store: why a rank has failed, and that the first one has left.
_COMPLAINT, _FIRST_LEFT = "complaint", "first-left"
#: How long the others wait until the first has said what there is to say, in seconds.
_LAST_WORDS = 60.0

_Made = TypeVar("_Made")


class ProcessGroupRanks:
    """The ranks of a process group; all of its processes make one at the same time.

    Args:
        store: By which the processes find each other.
        members: Their numbers there, in their order.
        me: That of this one.

    Attributes:
        rank: Which one this is, from 0.
        size: How many there are.
        on_this_host: How many of them share this machine.

    Raises:
        UsageError: if the others do not come.
        SystemFailure: if one is lost.
    """

    def __init__(self, store: Store, members: Sequence[int], me: int) -> None:
        self.rank, self.size = members.index(me), len(members)
        self._entered = 0
        try:
            self._store = meet(store, members, me)
            self._connections = Connections(part_of(self._store, "exchange"), self.rank, self.size)
            hosts = self._connections.numbers([_number(socket.gethostname())])
            self._heartbeat = Heartbeat(part_of(self._store, "heartbeat"), self.rank, self.size)
        except RuntimeError as failure:
            raise _lost(failure) from failure
        self.on_this_host = hosts.count(hosts[self.rank])
        weakref.finalize(self, self._heartbeat.end)  # of one that was never entered

    @classmethod
    def of(cls, group: dist.ProcessGroup) -> Self:
        """The processes of a group, of whatever backend."""
        store = dist.distributed_c10d._get_default_store()  # it has no public name
        return cls(store, dist.get_process_group_ranks(group), dist.get_rank())

    def broadcast(self, make: Callable[[], _Made]) -> _Made:
        made, content = None, b""
        if self.rank == 0:
            with self._failures():
                made = make()
                content = pickle.dumps(made)
        self._agree()
        with self._losses():
            content = self._connections.of_first(content)
        return cast("_Made", made if self.rank == 0 else pickle.loads(content))  # noqa: S301 - of our own making

    def gather(self, make: Callable[[], _Made]) -> list[_Made]:
        with self._failures():
            made = make()
            content = b"" if self.rank == 0 else pickle.dumps(made)
        self._agree()
        with self._losses():
            contents = self._connections.to_first(content)
        return [made, *map(pickle.loads, contents[1:])] if self.rank == 0 else []

    def watched(self, progress: Progress | None) -> Progress:
        def told(done: int, total: int) -> None:
            if progress is not None:
                progress(done, total)
            if self._heartbeat.is_over:
                raise self._stopped()

        return told

    def __enter__(self) -> Self:
        self._entered += 1
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None:
        """Nobody leaves before all do, unless they are stopped."""
        self._entered -= 1
        if self._entered:
            return
        try:
            if error is not None:
                self._fail(error)
            else:
                with self._failures():
                    self._leave()
        finally:
            try:
                self._heartbeat.end()
            finally:
                self._connections.close()

    def _leave(self) -> None:
        try:
            self._agree()
        except SystemFailure:
            if self.rank != 0:
                raise
            # What the others do, they do for this one, and have done by now.

    # --- Whether all are well

    def _agree(self) -> None:
        """Go on where no rank has failed; all ranks come here before they exchange anything."""
        if not self._heartbeat.step():
            raise self._stopped()

    @contextmanager
    def _failures(self) -> Iterator[None]:
        """Work, a failure of which stops all ranks."""
        try:
            yield
        except BaseException as failure:
            self._fail(failure)
            raise

    def _fail(self, failure: BaseException) -> None:
        """Have all ranks stop, unless they do."""
        if self._heartbeat.is_over:
            return
        with suppress(RuntimeError):  # of a store that is lost; the others will find that this one is, too
            self._store.set(_COMPLAINT, json.dumps(_complaint(self.rank, failure)))
        self._heartbeat.fail()

    @contextmanager
    def _losses(self) -> Iterator[None]:
        """Errors of the library, which has them where another process is gone; nobody waits for that one."""
        try:
            yield
        except RuntimeError as failure:
            raise self._stopped(failure) from failure

    def _stopped(self, failure: RuntimeError | None = None) -> CkptsurgError:
        """Why all ranks stop."""
        try:
            if self._store.check([_COMPLAINT]):
                return PeerFailed(**json.loads(self._store.get(_COMPLAINT)))
        except RuntimeError as loss:
            failure = loss
        known = failure or self._heartbeat.loss
        return SystemFailure("another rank has failed, and could not say why") if known is None else _lost(known)

    def wait_for_first(self) -> None:
        """Wait until the first rank has left the interpreter, so that no launcher stops it before it has spoken."""
        if self._heartbeat.loss is not None:
            return  # it may be the first that is lost
        end = time.monotonic() + _LAST_WORDS
        with suppress(RuntimeError):
            while time.monotonic() < end and not self._store.check([_FIRST_LEFT]):
                time.sleep(LOOK_EVERY)

    def first_leaves(self) -> None:
        """What the others then wait for."""
        with suppress(RuntimeError):
            self._store.set(_FIRST_LEFT, "")


def _number(text: str) -> int:
    return int.from_bytes(sha256(text.encode()).digest()[:7], "big")


def _complaint(rank: int, failure: BaseException) -> dict[str, object]:
    """The arguments of the others' PeerFailed."""
    if isinstance(failure, CkptsurgError):
        return {"rank": rank, "message": failure.message, "hint": failure.hint, "exit_code": failure.exit_code}
    message = f"{type(failure).__name__}: {shown(failure)}" if isinstance(failure, Exception) else "was stopped"
    return {"rank": rank, "message": message}


def _lost(failure: RuntimeError) -> SystemFailure:
    # Between a place in the library's source and advice on how to debug it.
    reason = str(failure).splitlines()[0].rpartition("] ")[2].partition(". ")[0]
    return SystemFailure(f"another rank is lost: {shown(reason)}")


@contextmanager
def joined() -> Iterator[ProcessGroupRanks]:
    """The ranks that ``torchrun`` has started with this one.

    Raises:
        UsageError: if the others do not come.
        SystemFailure: if one is lost.
    """
    try:
        store, me, size = next(rendezvous("env://", timeout=timedelta(seconds=START)))
    except (RuntimeError, ValueError) as failure:
        reason = shown(str(failure).splitlines()[0])
        raise UsageError(f"the other ranks of this run cannot be reached: {reason}", hint=TOGETHER) from failure
    ranks = ProcessGroupRanks(store, range(size), me)
    atexit.register(ranks.first_leaves if ranks.rank == 0 else ranks.wait_for_first)
    with ranks:
        yield ranks
