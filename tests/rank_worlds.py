"""Processes that rewrite together, one of which may be killed at any moment: forked from one that has imported torch.

A line of JSON on standard input is a run, and a line on standard output how it ended; see ``Zygote``.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import closing
from datetime import timedelta
from pathlib import Path
from typing import Any

#: Functions of ``disk`` at each call of which a run may be stopped, and the one by which bytes are read.
MOMENTS = (
    "append", "clone_range", "create", "flush", "flush_folder", "make_folder", "move", "reopen", "set_size",
    "write_all",
)  # fmt: skip


class Zygote:
    """A process that has imported what runs need, and forks for each of them."""

    def __init__(self) -> None:
        command = [sys.executable, "-m", "tests.rank_worlds"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def run(
        self,
        ranks: int,
        kill: tuple[int, int] | None = None,
        call: str = "rewrite",
        *,
        sent: signal.Signals = signal.SIGKILL,
        own: dict[int, dict[str, Any]] | None = None,
        times: int = 1,
        groups: Sequence[int] = (),
        **arguments: Any,
    ) -> list[dict[str, Any]]:
        """Call a function of ckptsurg in so many processes.

        Args:
            ranks: How many.
            kill: Which rank is killed, and before the how manieth of its moments, from 0; None for none.
            call: The function, ``rewrite`` or ``verify``.
            sent: What signal it is that the rank is sent.
            own: What some ranks are given in the place of arguments, by their number; as ``fault`` one of the functions
                of ``disk``, which then finds the disk full; as ``folder`` that in which they work; as ``call`` another
                function.
            times: How often each of them calls it.
            groups: How many groups each of them has made before.
            arguments: Its arguments.

        Returns:
            Of each rank its exit code, negative the signal; how many moments it had, and bytes it read; what it said;
            as JSON what the function returned.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        kill = None if kill is None else (*kill, sent)
        each = [{**arguments, **(own or {}).get(rank, {})} for rank in range(ranks)]
        groups = [*groups, *[0] * (ranks - len(groups))]
        self._process.stdin.write(json.dumps([kill, call, times, groups, each]) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        self._process.communicate(timeout=30)


def _serve() -> None:
    import torch.distributed.checkpoint  # noqa: F401 - once, for all runs

    from ckptsurg import journal, rewriting  # noqa: F401 - likewise
    from ckptsurg.ranks import connections, process_group  # noqa: F401 - likewise

    journal._SAID_EVERY = 1 << 10  # checkpoints are small here
    connections._SILENT = timedelta(seconds=10)  # and nobody has the time
    for line in sys.stdin:
        sys.stdout.write(json.dumps(_forked(*json.loads(line))) + "\n")
        sys.stdout.flush()


def _forked(
    kill: list[int] | None, call: str, times: int, groups: list[int], each: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    children = []
    for rank in range(len(each)):
        receiving, sending = os.pipe()
        if (child := os.fork()) == 0:
            os.close(receiving)
            os.environ.update(RANK=str(rank), WORLD_SIZE=str(len(each)), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
            moment = kill[1:] if kill is not None and kill[0] == rank else None
            _rank(moment, call, times, groups[rank], each[rank], sending)
        os.close(sending)
        children.append((child, receiving))
    ended = []
    for rank, (child, receiving) in enumerate(children):
        if kill is not None and kill[0] == rank and kill[2] == signal.SIGSTOP:
            os.kill(child, signal.SIGKILL)  # the first rank has ended
        with open(receiving) as pipe:  # noqa: PTH123 - of a descriptor
            said = pipe.read()
        _, status = os.waitpid(child, 0)
        ended.append({"code": os.waitstatus_to_exitcode(status), "moments": 0, "said": "", **json.loads(said or "{}")})
    return ended


def _rank(
    moment: list[int] | None, call: str, times: int, groups: int, arguments: dict[str, Any], sending: int
) -> None:
    import torch.distributed as dist

    import ckptsurg

    _fill_disk(arguments.pop("fault", None))
    os.chdir(arguments.pop("folder", "."))
    call = arguments.pop("call", call)
    count, code, said, result = _counted(moment), 0, [], ""
    logging.getLogger("ckptsurg").addHandler(_Listing(said))
    logging.getLogger("ckptsurg").setLevel(logging.INFO)
    try:
        dist.init_process_group("gloo", timeout=timedelta(seconds=60))
        for _ in range(groups):
            dist.new_group([dist.get_rank()], use_local_synchronization=True)
        for _ in range(times):
            result = getattr(ckptsurg, call)(**arguments, group=dist.group.WORLD).to_json()
    except ckptsurg.CkptsurgError as error:
        code = error.exit_code
        said.append(f"{type(error).__name__}: {error}")
    except BaseException as error:
        code = 99
        said.append(repr(error))
    os.write(sending, json.dumps({**count(), "said": "\n".join(said), "result": result}).encode())
    os._exit(code)


class _Listing(logging.Handler):
    def __init__(self, said: list[str]) -> None:
        super().__init__()
        self._said = said

    def emit(self, record: logging.LogRecord) -> None:
        self._said.append(record.getMessage())


def _fill_disk(name: str | None) -> None:
    from ckptsurg import disk

    def full(*_: Any) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if name is not None:
        setattr(disk, name, full)


def _counted(moment: list[int] | None) -> Callable[[], dict[str, int]]:
    """Count moments and bytes read from now on, and send this process a signal at one; how many there were."""
    from ckptsurg import disk
    from ckptsurg.checkpoints import StoredFile

    seen = 0

    def counting(function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any) -> Any:
            nonlocal seen
            if moment is not None and seen == moment[0]:
                os.kill(os.getpid(), moment[1])
            seen += 1
            return function(*arguments)

        return counted

    for name in MOMENTS:
        setattr(disk, name, counting(getattr(disk, name)))
    StoredFile.fill = counting(StoredFile.fill)
    before = _read_so_far()
    return lambda: {"moments": seen, "read": _read_so_far() - before}


def _read_so_far() -> int:
    """Bytes that this process has read, as the kernel counts them."""
    return int(re.search(r"rchar: (\d+)", Path("/proc/self/io").read_text())[1])


def contents(folder: Path) -> dict[str, bytes]:
    """All files of a folder."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


if __name__ == "__main__":
    _serve()
