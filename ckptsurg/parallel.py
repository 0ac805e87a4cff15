"""Work in threads: segments side by side, and in each of them steps, of which one part is done in order.

A thread keeps to its segment, so that what must be done in order (a digest) is mostly done by one thread, while what
it works on is in its cache. Whoever finds no new segment helps with another's, so that one huge tensor keeps all busy.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from threading import Condition, Lock, Thread
from typing import Protocol, TypeAlias

from .metering import Meter
from .tensors import Buffer

__all__ = ["MOST_JOBS", "Segment", "Step", "available_jobs", "buffer_bytes", "run"]

#: How many threads may be asked for.
MOST_JOBS = 1024
_MOST_BUFFER_BYTES = 2 << 20
_ALL_BUFFERS_BYTES = 32 << 20
_LEAST_BUFFER_BYTES = 64 << 10
#: How often progress is told, in seconds.
_TOLD_EVERY = 0.1


class Step(Protocol):
    """A part of a segment."""

    def fetch(self, buffer: memoryview) -> Buffer:
        """What may be done at any time, beside other steps.

        Args:
            buffer: Of ``buffer_bytes``; of the calling thread alone.

        Returns:
            What ``follow`` is given; its bytes count as done.
        """

    def follow(self, data: Buffer) -> None:
        """What is done after the steps before this one in the segment."""


#: Steps in their order, made as they are asked for.
Segment: TypeAlias = Iterator[Step]


def available_jobs() -> int:
    """How many processors this process may use, up to 64: more threads would wait for each other."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, 64)


def buffer_bytes(jobs: int) -> int:
    """Size of the buffer of each of so many threads, in bytes; a power of two."""
    share = _ALL_BUFFERS_BYTES // jobs
    return max(_LEAST_BUFFER_BYTES, min(_MOST_BUFFER_BYTES, 1 << share.bit_length() - 1))


def run(segments: Iterable[Segment], jobs: int, meter: Meter) -> None:
    """Do all steps of all segments.

    Segments and steps are asked for one at a time, in their order, by whichever thread comes first. With one job all is
    done in the calling thread. Who wants to know of progress is told in the calling thread.

    Args:
        segments: The work.
        jobs: How many threads there are.
        meter: Counts what is done.

    Raises:
        Exception: The first that a step raised; the others stop at their next step.
    """
    pool = _Pool(segments, buffer_bytes(jobs), meter)
    threads = [Thread(target=pool.work, name=f"ckptsurg-{number}") for number in range(jobs)] if jobs > 1 else []
    try:
        if not _start(threads):
            pool.work()
        for thread in threads:
            while thread.is_alive():
                thread.join(_TOLD_EVERY)
                meter.tell()
    finally:
        pool.stop()
        _wait(threads)
    if pool.failure is not None:
        raise pool.failure
    meter.tell()


def _start(threads: Iterable[Thread]) -> int:
    """Start threads; how many could be: a process may be allowed only so many."""
    started = 0
    for thread in threads:
        try:
            thread.start()
        except RuntimeError:
            break
        started += 1
    return started


def _wait(threads: Iterable[Thread]) -> None:
    """Wait for threads that soon end, whoever interrupts, however often: they use what is closed after them."""
    interruption: BaseException | None = None
    for thread in threads:
        while thread.is_alive():
            try:
                thread.join()
            except BaseException as raised:  # it is raised again
                interruption = raised
    if interruption is not None:
        raise interruption


class _Strand:
    """A segment that is being worked on.

    Attributes:
        steps: Those that nobody has begun.
        begun: How many were begun.
        followed: How many are done.
        turn: Guards ``followed``, and tells of its changes.
        has_failed: Whether one failed: those after it would follow on what is not there.
    """

    def __init__(self, segment: Segment) -> None:
        self.steps = segment
        self.begun = self.followed = 0
        self.turn = Condition()
        self.has_failed = False

    def do(self, number: int, step: Step, buffer: memoryview) -> int:
        """Do a step; how many bytes it was. Its turn comes and goes even where it fails: others wait for theirs."""
        data: Buffer | None = None
        try:
            data = step.fetch(buffer)
        finally:
            with self.turn:
                self.turn.wait_for(lambda: self.followed == number)
            is_done = False
            try:
                if data is not None and not self.has_failed:
                    step.follow(data)
                    is_done = True
            finally:
                with self.turn:
                    self.has_failed = self.has_failed or not is_done
                    self.followed += 1
                    self.turn.notify_all()
        return len(data)


class _Pool:
    """The threads of a run.

    Attributes:
        failure: What stopped them.
    """

    def __init__(self, segments: Iterable[Segment], size: int, meter: Meter) -> None:
        self._segments, self._size, self._meter = iter(segments), size, meter
        self._strands: list[_Strand] = []
        self._lock = Lock()
        self._is_stopped = False
        self.failure: BaseException | None = None

    def stop(self) -> None:
        self._is_stopped = True

    def work(self) -> None:
        """Do one step after another until there is none left."""
        try:
            buffer = memoryview(bytearray(self._size))
            strand: _Strand | None = None
            while (taken := self._take(strand)) is not None:
                strand, number, step = taken
                self._meter.advance(strand.do(number, step, buffer))
        except BaseException as failure:  # it is raised again in the thread that waits
            self.failure = self.failure or failure
            self.stop()

    def _take(self, own: _Strand | None) -> tuple[_Strand, int, Step] | None:
        """The next step: of the thread's own strand, or of a new one, or else of another's."""
        with self._lock:
            for strand in self._candidates(own):
                if self._is_stopped:
                    return None
                step = next(strand.steps, None)
                if step is not None:
                    strand.begun += 1
                    return strand, strand.begun - 1, step
                self._strands.remove(strand)
        return None

    def _candidates(self, own: _Strand | None) -> Iterator[_Strand]:
        if own in self._strands:
            yield own
        for segment in self._segments:
            strand = _Strand(segment)
            self._strands.append(strand)
            yield strand
        yield from list(self._strands)
