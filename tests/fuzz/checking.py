"""What holds for every input of every reader: how it may refuse, and what it may cost."""

from __future__ import annotations

import random
import resource
import signal
import tempfile
import traceback
import tracemalloc
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TypeVar

from ckptsurg.errors import DocumentError

MAX_INPUT = 4096  # bytes
MAX_SECONDS = 1.0  # of the processor, of this process
MAX_MESSAGE = 20_000  # characters
MEMORY_PER_BYTE = 10
#: Of Python's own memory, in bytes, beside ten times the input. Of all seeds and cases, none takes more than 45 kB.
ALLOWANCE = 1 << 18
#: Of a document: all its mistakes are told at once, of which 4 kB have room for 2,000, of 500 bytes to 1 kB each.
MISTAKES = 3 << 20
#: Where patterns are written out. A stated limit: braces may stand for 10,000 patterns, of 10 million characters in
#: all, and each is a text of its own.
WRITTEN_OUT = 24 << 20
#: Of the process's memory, in bytes, which also libraries in C take: RE2 alone may have 8 MB for an
#: expression. Seen only where it is the most that the process ever had.
RESIDENT_ALLOWANCE = 48 << 20
#: Python's memory is traced in one call of so many, for it slows code down; so does counting what it covers. By what
#: factors at the most, was measured.
TRACED_EVERY, TRACING, COUNTING = 16, 7.0, 2.5

CASES = Path(__file__).parents[1] / "cases"
_INVISIBLE = {"Cc", "Cf", "Cs", "Zl", "Zp"}

T = TypeVar("T")


class Finding(BaseException):
    """Something that does not hold. No reader is to take it for a failure of its own, so it is no Exception."""

    def __init__(self, kind: str, data: bytes, detail: str) -> None:
        super().__init__(f"{kind}: {detail}\ninput of {len(data):,} bytes: {data!r}")
        self.kind, self.data = kind, data


@dataclass(frozen=True)
class Target:
    """One reader under test.

    Attributes:
        seeds: Inputs to begin with.
        words: What its language is made of; bytes are mutated with them, and values of documents.
        holds: Raises Finding if something does not hold for an input.
        mutate: Changes an input so that it stays a document, or gives None where it is none.
    """

    seeds: Sequence[bytes]
    words: Sequence[str]
    holds: Callable[[bytes], None]
    mutate: Callable[[bytes, random.Random], bytes | None] | None = None


_home = tempfile.TemporaryDirectory(prefix="ckptsurg-fuzz-")


def scratch(name: str) -> Path:
    """An empty folder for a target's files, which is gone when the process ends."""
    folder = Path(_home.name, name)
    folder.mkdir()
    return folder


def cases(endings: tuple[str, ...], *kinds: str) -> list[bytes]:
    """The files of the corpus that is named by defect, of these kinds and with these endings, in order."""
    files = [path for kind in kinds for path in sorted((CASES / kind).rglob("*")) if path.name.endswith(endings)]
    found = [path.read_bytes() for path in files if path.is_file() and path.name != "expected.yaml"]
    return [data for data in found if len(data) <= MAX_INPUT]


# --- One call ----------------------------------------------------------------------------------------


class _Limits:
    """Whether costs are limited, how often memory is traced, how much slower than by itself a reader runs."""

    on = True
    traced_every = TRACED_EVERY
    slowdown = 1.0
    calls = 0


@contextmanager
def unlimited() -> Iterator[None]:
    """For the first calls, which import and compile what later ones use."""
    _Limits.on = False
    try:
        yield
    finally:
        _Limits.on = True


def configure(traced_every: int = TRACED_EVERY, slowdown: float = 1.0) -> None:
    _Limits.traced_every, _Limits.slowdown = traced_every, slowdown


def attempt(read: Callable[[], T], data: bytes, refusal: type[Exception], allowance: int = ALLOWANCE) -> T | None:
    """What a reader makes of an input; None where it refuses it as it should.

    Args:
        read: The reader, with the input.
        data: The input.
        refusal: What it may raise.
        allowance: What it may take of Python's memory beside ten times the input, in bytes.

    Raises:
        Finding: if it fails otherwise, or takes too long or too much.
    """
    try:
        return _attempted(read, data, refusal, allowance)
    except Finding as found:
        if found.kind != "memory":
            raise
    return _attempted(read, data, refusal, allowance)  # what was imported or kept for later is not taken again


def _attempted(read: Callable[[], T], data: bytes, refusal: type[Exception], allowance: int) -> T | None:
    with _limited(data, allowance):
        try:
            return read()
        except refusal as refused:
            _check_message(refused, data)
        except Exception as failure:
            raise Finding("exception", data, traceback.format_exc(limit=-3)[:MAX_MESSAGE]) from failure
    return None


def _check_message(refused: Exception, data: bytes) -> None:
    """Of a message that is no sentence but goes into one, all holds too."""
    said = str(refused)
    if len(said) > MAX_MESSAGE:
        raise Finding("message", data, f"{len(said):,} characters: {said[:400]!r}")
    lines = said.split("\n")
    if hidden := [c for line in lines for c in line if not " " <= c <= "~" and unicodedata.category(c) in _INVISIBLE]:
        raise Finding("message", data, f"holds {hidden[0]!a}: {said[:400]!a}")
    problems = len(refused.problems) if isinstance(refused, DocumentError) else 1
    if not said.strip() or len(lines) > problems + (problems > 1 and getattr(refused, "hint", None) is not None):
        raise Finding("message", data, f"{len(lines)} lines for {problems} problems: {said[:400]!r}")


@contextmanager
def _limited(data: bytes, allowance: int) -> Iterator[None]:
    if not _Limits.on:
        yield
        return

    def too_long(number: int, frame: FrameType | None) -> None:
        raise Finding("hang", data, f"more than {seconds:g} s")

    _Limits.calls += 1
    traced = _Limits.calls % _Limits.traced_every == 0
    seconds = MAX_SECONDS * _Limits.slowdown * (TRACING if traced else 1)
    resident = _peak_resident()
    previous = signal.signal(signal.SIGPROF, too_long)
    if traced:
        tracemalloc.start()
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
        signal.setitimer(signal.ITIMER_PROF, 0)
        taken = tracemalloc.get_traced_memory()[1] if traced else 0
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, previous)
        tracemalloc.stop()
    for what, found, allowed in (
        ("Python's memory", taken, allowance),
        ("the process", _peak_resident() - resident, RESIDENT_ALLOWANCE),
    ):
        if found > MEMORY_PER_BYTE * len(data) + allowed:
            raise Finding("memory", data, f"{what} grew by {found:,} bytes")


def _peak_resident() -> int:
    """The most memory that the process ever had, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def require(holds: bool, data: bytes, detail: str) -> None:
    """Raise Finding if what was read is not what the input says."""
    if not holds:
        raise Finding("differs", data, detail[:MAX_MESSAGE])
