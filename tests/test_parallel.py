"""Work in threads: every step once, what must be in order in order, failures and progress where they are waited for."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptsurg.metering import Meter
from ckptsurg.parallel import Step, buffer_bytes, run


class Noted:
    """A step that notes what is done with it."""

    def __init__(self, notes: list[tuple[str, int, int]], segment: int, number: int) -> None:
        self.notes, self.segment, self.number = notes, segment, number

    def fetch(self, buffer: memoryview) -> bytes:
        buffer[0] = self.number % 256
        self.notes.append(("fetch", self.segment, self.number))
        return bytes(buffer[:1])

    def follow(self, data: bytes) -> None:
        assert data == bytes([self.number % 256])  # its own buffer, that nobody else wrote to meanwhile
        self.notes.append(("follow", self.segment, self.number))


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 40), max_size=12), st.integers(1, 5))
def test_every_step_is_done_once_and_followed_in_its_order(sizes, jobs):
    notes: list[tuple[str, int, int]] = []
    told: list[tuple[int, int]] = []
    steps = ((Noted(notes, segment, number) for number in range(size)) for segment, size in enumerate(sizes))
    run(steps, jobs, Meter(sum(sizes), lambda done, total: told.append((done, total))))
    every = [(segment, number) for segment, size in enumerate(sizes) for number in range(size)]
    assert sorted((s, n) for what, s, n in notes if what == "fetch") == every
    for segment, size in enumerate(sizes):
        assert [n for what, s, n in notes if what == "follow" and s == segment] == list(range(size))
    assert told == sorted(set(told))
    assert not sizes or not sum(sizes) or told[-1] == (sum(sizes), sum(sizes))


def test_idle_threads_help_with_a_huge_segment():
    """The first step waits for the second, which only another thread can begin."""
    begun = threading.Event()

    class First:
        def fetch(self, buffer: memoryview) -> bytes:
            assert begun.wait(30)
            return b""

        def follow(self, data: bytes) -> None: ...

    class Second(First):
        def fetch(self, buffer: memoryview) -> bytes:
            begun.set()
            return b""

    run([iter([First(), Second()])], 2, Meter(0, None))
    assert begun.is_set()


@pytest.mark.parametrize("jobs", [1, 3])
@pytest.mark.parametrize("where", ["fetch", "follow", "steps", "segments"])
def test_the_first_failure_stops_all_and_is_raised(jobs, where):
    done = []

    class Failing(Noted):
        def fetch(self, buffer: memoryview) -> bytes:
            if where == "fetch" and self.number == 5:
                raise OSError("broken")
            done.append(self.number)
            return b"1"

        def follow(self, data: bytes) -> None:
            if where == "follow" and self.number == 5:
                raise OSError("broken")

    def steps(segment: int) -> Iterator[Step]:
        for number in range(10_000):
            if where == "steps" and number == 5:
                raise OSError("broken")
            yield Failing([], segment, number)

    def segments() -> Iterator[Iterator[Step]]:
        yield steps(0)
        if where == "segments":
            raise OSError("broken")
        yield from map(steps, range(1, 9))

    before = threading.active_count()
    with pytest.raises(OSError, match="broken"):
        run(segments(), jobs, Meter(1, None))
    assert len(done) < 90_000
    assert threading.active_count() == before


def test_progress_is_told_in_the_thread_that_waits_and_may_stop_the_work():
    class Stop(Exception):
        pass

    tellers = set()
    done = []
    is_told = threading.Event()

    class Step:
        def fetch(self, buffer: memoryview) -> bytes:
            if done:
                assert is_told.wait(30)
            done.append(1)
            return b"12"

        def follow(self, data: bytes) -> None: ...

    def tell(count: int, total: int) -> None:
        tellers.add(threading.current_thread())
        is_told.set()
        raise Stop

    with pytest.raises(Stop):
        run((iter([Step()]) for _ in range(100_000)), 2, Meter(200_000, tell))
    assert tellers == {threading.current_thread()} and len(done) < 100_000


@pytest.mark.parametrize("jobs", [1, 2])
def test_what_follows_on_a_failure_is_not_followed(jobs):
    """Else its digest would be of other bytes."""
    followed = []

    class Step:
        def __init__(self, number: int) -> None:
            self.number = number

        def fetch(self, buffer: memoryview) -> bytes:
            if self.number == 3:
                raise OSError("broken")
            return b"1"

        def follow(self, data: bytes) -> None:
            followed.append(self.number)

    with pytest.raises(OSError, match="broken"):
        run([map(Step, range(9))], jobs, Meter(9, None))
    assert followed == [0, 1, 2]


def test_buffers_of_many_threads_are_small():
    assert buffer_bytes(1) == buffer_bytes(8) == 2 << 20
    assert all(buffer_bytes(jobs) * jobs <= 32 << 20 for jobs in range(1, 500))
    assert buffer_bytes(10_000) == 64 << 10


def test_where_no_thread_may_be_started_digests_are_made_without():
    script = """
import os, resource
from ckptsurg.tensors import Digester
if os.getuid() == 0:  # whom no limit binds
    os.setgroups([])
    os.setresuid(65534, 65534, 65534)
resource.setrlimit(resource.RLIMIT_NPROC, (1, 1))
for threads in (None, 2):
    digester = Digester("blake3", threads)
    digester.update(bytes(1 << 20))
    print(digester)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split() == [f"blake3:{blake3(bytes(1 << 20)).hexdigest()}"] * 2
