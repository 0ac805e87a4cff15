"""One process at a time, timed, in rounds in which every tool runs beside its yardstick."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .tools import Tool

# In a process of its own, which gives the memory back and leaves ours as small as it was.
_TOUCH = "import mmap, sys; mmap.mmap(-1, int(sys.argv[1]), flags=mmap.MAP_PRIVATE | mmap.MAP_ANON | mmap.MAP_POPULATE)"
_OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}


class Failed(Exception):
    """The last line of what a tool said before it failed."""


@dataclass(frozen=True)
class Timed:
    seconds: float  # of the whole process, from before it starts
    memory: int  # largest resident memory in bytes, of it and the processes that it waited for


@dataclass(frozen=True)
class Outcome:
    """Of one run: what was timed, or how it failed; and the seconds of the yardstick that ran just before it."""

    round: int
    tool: Tool
    timed: Timed | Failed
    beside: float | None


def rounds(tools: list[Tool], count: int, out: Path, touched: int) -> Iterator[Outcome]:
    """Every tool once a round, in an order by chance, its yardstick just before it.

    Round 0 fills caches and does not count. Who fails is left out from then on.
    """
    yardsticks = {tool.name: tool for tool in tools if tool.yardstick is None}
    left = [tool for tool in tools if tool.yardstick in yardsticks]
    chance = random.Random(0)
    for number in range(count + 1):
        for tool in chance.sample(left, len(left)):
            beside: float | None = None
            for one in (yardsticks[tool.yardstick or ""], tool):
                shutil.rmtree(out, ignore_errors=True)
                subprocess.run(["sync"], check=True)
                # Where a virtual machine gives freed pages back, whoever touches memory first after a pause pays.
                subprocess.run([sys.executable, "-I", "-S", "-c", _TOUCH, str(touched)], check=True)
                try:
                    found = timed(one.command)
                except Failed as failure:
                    left.remove(tool)
                    yield Outcome(number, one, failure, None)
                    break
                yield Outcome(number, one, found, beside)
                beside = found.seconds
    shutil.rmtree(out, ignore_errors=True)


def timed(command: list[str]) -> Timed:
    """Run a command to its end.

    Raises:
        Failed: It could not be started, or did not exit with 0.
    """
    with tempfile.TemporaryFile() as said:
        begun = time.perf_counter()
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=said,
                env=os.environ | _OFFLINE,
                start_new_session=True,
            )
        except OSError as error:
            raise Failed(str(error.strerror)) from error
        try:
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:  # such as Ctrl-C: nothing may be left that writes to an image
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise
        seconds = time.perf_counter() - begun
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            said.seek(0)
            lines = said.read().decode(errors="replace").strip().splitlines()
            raise Failed(lines[-1].strip() if lines else f"exit code {process.returncode}")
    return Timed(seconds, usage.ru_maxrss * 1024)


def memory_to_touch(gigabytes: float) -> int:
    """Bytes: what a tool that holds a checkpoint needs with its output's cache, and more, of what the inputs leave.

    Files are cached in blocks of memory of other sizes than those that were just released: touch too little, and a
    tool gets blocks that nobody has touched.
    """
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    inputs = int(3 * gigabytes * 1e9)  # base, published, and what is copied or trained: these are to stay cached
    return max(0, min(int((3 * gigabytes + 2) * 1e9), int(0.85 * physical) - inputs))
