"""The system calls of a run that change what is on the disk, as strace sees them, and faults in each of them."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from .scenes import Scene, run

#: Those that change files, folders or locks; ``openat`` where it creates. Python's own start makes none of them.
CHANGING = (
    "chmod", "fallocate", "fdatasync", "fsync", "flock", "ftruncate", "ioctl", "link", "linkat", "mkdir", "mkdirat",
    "openat", "pwrite64", "pwritev", "rename", "renameat", "renameat2", "rmdir", "sync_file_range", "unlink",
    "unlinkat",
)  # fmt: skip

_CALL = re.compile(r"^(?:\d+ +)?(\w+)\((.*)")
_TERMINAL = re.compile(r"TCGETS|TIOC|FIOCLEX")


@dataclass(frozen=True)
class Call:
    """A system call of a run.

    Attributes:
        name: What it is called.
        number: The how manieth of that name it is, from one.
        arguments: As strace writes them.
    """

    name: str
    number: int
    arguments: str

    def __str__(self) -> str:
        return f"{self.name} {self.number}: {self.arguments[:60]}"


def strace(scene: Scene, folder: Path, *options: str) -> tuple[int | None, str]:
    """Run a scene's rewrite in a folder; its exit code, None if it was killed, and what it said."""
    log = folder.parent / f"{folder.name}.strace"
    done = run(("strace", "-f", "-y", "-qq", "-o", log, *options, *scene.command), folder, timeout=60)
    return (None if done.returncode < 0 or done.returncode == 137 else done.returncode), done.stderr


def changing_calls(scene: Scene, folder: Path) -> list[Call]:
    """The calls of an undisturbed run, in their order."""
    code, said = strace(scene, folder, "--seccomp-bpf", "-e", f"trace={','.join(CHANGING)}")
    assert code == 0, said
    counted: Counter[str] = Counter()
    found = []
    for line in (folder.parent / f"{folder.name}.strace").read_text().splitlines():
        match = _CALL.match(line)
        if match is None:
            continue
        name, arguments = match.groups()
        counted[name] += 1
        changes = "O_CREAT" in arguments if name == "openat" else not (name == "ioctl" and _TERMINAL.search(arguments))
        if changes:
            found.append(Call(name, counted[name], arguments))
    return found


def disturbed(scene: Scene, folder: Path, call: Call, fault: str) -> tuple[int | None, str]:
    """Run a scene with a fault in one call: ``signal=SIGKILL``, ``error=EIO``, ``retval=7``."""
    faster = [] if fault.startswith("signal") else ["--seccomp-bpf"]  # which keeps strace from sending signals
    injection = f"inject={call.name}:{fault}:when={call.number}"
    return strace(scene, folder, *faster, "-e", f"trace={call.name}", "-e", injection)
