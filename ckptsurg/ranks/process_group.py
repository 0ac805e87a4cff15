"""The ranks of a process group of ``torch.distributed``, which speak over Gloo."""

from __future__ import annotations

import pickle
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from types import TracebackType
from typing import Any, Self, TypeVar, cast
from uuid import uuid4

import torch
import torch.distributed as dist

from ..errors import CkptsurgError, PeerFailed, SystemFailure, UsageError
from ..metering import Progress
from ..wording import shown

__all__ = ["ProcessGroupRanks", "joined"]

#: How long ranks wait for others to start.
_START = timedelta(minutes=5)
#: How long ranks wait for others that are at work: a loss is seen from connections that close.
_WORK = timedelta(days=30)
#: How often it is looked whether others have failed, in seconds; and whether all have arrived, from and to.
_WATCHED_EVERY, _WAITED_FROM, _WAITED_TO = 1.0, 0.002, 0.2

_Made = TypeVar("_Made")


@dataclass(frozen=True, slots=True)
class _Complaint:
    """Why a rank has failed, for the others."""

    rank: int
    message: str
    hint: str | None
    exit_code: int


class ProcessGroupRanks:
    """The ranks of a process group; all of its processes make one at the same time.

    Args:
        group: The group, of whatever backend; None for all processes.

    Attributes:
        rank: Which one this is, from 0.
        size: How many there are.
        on_this_host: How many of them share this machine.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        members = dist.get_process_group_ranks(group or dist.group.WORLD)
        self._group = dist.new_group(members, timeout=_WORK, backend="gloo", use_local_synchronization=True)
        self.rank, self.size = dist.get_rank(self._group), len(members)
        self._is_stopped = False
        self._entered = 0
        self._looked = 0.0
        self._store = dist.distributed_c10d._get_default_store()  # it has no public name
        self._failed = f"ckptsurg/{self.share(lambda: uuid4().hex)}/failed"
        hosts: list[Any] = [None] * self.size
        dist.all_gather_object(hosts, socket.gethostname(), group=self._group)
        self.on_this_host = hosts.count(socket.gethostname())

    def share(self, make: Callable[[], _Made]) -> _Made:
        made, failure = None, None
        if self.rank == 0:
            made, failure = _attempted(lambda: pickle.dumps(make()))
        self._agree(failure)
        box = [made]
        with self._losses():
            dist.broadcast_object_list(box, group=self._group, group_src=0)
        return cast("_Made", pickle.loads(cast("bytes", box[0])))  # noqa: S301 - of our own making

    def gather(self, make: Callable[[], _Made]) -> list[_Made]:
        made, failure = _attempted(lambda: pickle.dumps(make()))
        self._agree(failure)
        boxes: list[Any] | None = [None] * self.size if self.rank == 0 else None
        with self._losses():
            dist.gather_object(made, boxes, group=self._group, group_dst=0)
        return [pickle.loads(box) for box in boxes or ()]  # noqa: S301 - of our own making

    def watched(self, progress: Progress | None) -> Progress:
        def told(done: int, total: int) -> None:
            if progress is not None:
                progress(done, total)
            if time.monotonic() - self._looked > _WATCHED_EVERY:
                self._looked = time.monotonic()
                with self._losses():
                    has_failed = self._store.check([self._failed])
                if has_failed:
                    raise _OthersFailed

        return told

    def _agree(self, failure: Exception | None) -> None:
        """Go on where no rank has failed; all ranks come here before they exchange anything."""
        is_own = failure is not None and not isinstance(failure, _OthersFailed)
        with self._losses():
            if is_own and hasattr(self, "_failed"):
                self._store.set(self._failed, "")
            votes = [torch.zeros(1, dtype=torch.uint8) for _ in range(self.size)]
            vote = dist.all_gather(votes, torch.tensor([is_own], dtype=torch.uint8), group=self._group, async_op=True)
            _wait(vote)
            if not any(map(int, votes)):
                return
            complaints: list[Any] = [None] * self.size
            dist.all_gather_object(complaints, self._complaint(failure) if is_own else None, group=self._group)
        self._is_stopped = True
        if is_own and failure is not None:
            raise failure
        first = next(complaint for complaint in complaints if complaint is not None)
        raise PeerFailed(first.rank, first.message, hint=first.hint, exit_code=first.exit_code)

    def _complaint(self, failure: Exception | None) -> _Complaint:
        if isinstance(failure, CkptsurgError):
            return _Complaint(self.rank, failure.message, failure.hint, failure.exit_code)
        if isinstance(failure, OSError):
            place = f" ({shown(failure.filename)})" if failure.filename else ""
            return _Complaint(self.rank, f"{failure.strerror or failure}{place}", None, SystemFailure.exit_code)
        message = f"{type(failure).__name__}: {shown(failure)}"
        return _Complaint(self.rank, message, None, SystemFailure.exit_code)

    @contextmanager
    def _losses(self) -> Iterator[None]:
        """Errors of the library, which has them where another process is gone; nobody waits for that one."""
        try:
            yield
        except RuntimeError as failure:
            self._is_stopped = True
            reason = str(failure).splitlines()[0].rpartition("] ")[2]
            raise SystemFailure(f"another rank is lost: {shown(reason)}") from failure

    def __enter__(self) -> Self:
        self._entered += 1
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None:
        """Nobody leaves before all do, unless they are stopped; who is stopped from outside does not wait."""
        self._entered -= 1
        try:
            if not self._is_stopped and (error is None or isinstance(error, Exception)):
                self._agree(error)
        finally:
            if not self._entered:
                dist.destroy_process_group(self._group)


class _OthersFailed(Exception):
    """Work was given up, for another rank has failed."""


def _attempted(make: Callable[[], bytes]) -> tuple[bytes | None, Exception | None]:
    try:
        return make(), None
    except Exception as failure:  # whatever it is, the others must not wait
        return None, failure


def _wait(work: dist.Work) -> None:
    """Wait so that signals are heard: the library waits deaf."""
    pause = _WAITED_FROM
    while not work.is_completed():
        time.sleep(pause)
        pause = min(2 * pause, _WAITED_TO)
    work.wait()


@contextmanager
def joined() -> Iterator[ProcessGroupRanks]:
    """The ranks that ``torchrun`` has started with this one.

    Raises:
        UsageError: if the others do not come.
    """
    try:
        dist.init_process_group("gloo", timeout=_START)
        ranks = ProcessGroupRanks()
    except (RuntimeError, ValueError) as failure:
        hint = "all are started by one torchrun; to run alone inside of one, unset TORCHELASTIC_RUN_ID"
        reason = shown(str(failure).splitlines()[0])
        raise UsageError(f"the other ranks of this run cannot be reached: {reason}", hint=hint) from failure
    try:
        with ranks:
            yield ranks
    finally:
        dist.destroy_process_group()
