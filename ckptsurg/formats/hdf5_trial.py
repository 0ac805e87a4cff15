"""A program of its own that reads all of HDF5's structures in a file: on a damaged one HDF5 may loop or crash.

It imports nothing of this package. ``keras_safety`` runs it, with a path, a member of the archive that is there or
nothing, and limits in seconds of processor time and bytes of memory. What HDF5 says it cannot read goes to standard
output, and the exit code is 1.
"""

from __future__ import annotations

import resource
import sys
import zipfile
from contextlib import ExitStack
from pathlib import Path

import h5py


def main(path: str, member: str, seconds: str, memory: str) -> int:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    used = resource.getrusage(resource.RUSAGE_SELF)
    _limit(resource.RLIMIT_CPU, int(used.ru_utime + used.ru_stime) + int(seconds))
    statm = Path("/proc/self/statm")
    if statm.exists():
        pages = int(statm.read_text().split()[0])
        _limit(resource.RLIMIT_AS, pages * resource.getpagesize() + int(memory))
    try:
        with ExitStack() as stack:
            where = stack.enter_context(stack.enter_context(zipfile.ZipFile(path)).open(member)) if member else path
            _read(stack.enter_context(h5py.File(where, "r")))
    except Exception as error:  # nearly anything is raised
        sys.stdout.write(f"{type(error).__name__}: {error}")
        return 1
    return 0


def _limit(what: int, limit: int) -> None:
    _, hard = resource.getrlimit(what)
    if hard == resource.RLIM_INFINITY or limit <= hard:
        resource.setrlimit(what, (limit, hard))


def _read(file: h5py.File) -> None:
    """Follow every link by its name, and read every attribute and every table of chunks, but no values."""
    links: list[tuple[str, object]] = []
    file.visititems_links(lambda name, link: links.append((name, link)))
    for name, link in [("/", h5py.HardLink()), *links]:
        if not isinstance(link, h5py.HardLink):
            continue
        one = file[name]
        dict(one.attrs)
        if isinstance(one, h5py.Group):
            _ = "" in one, "\x7f" in one  # before and after all names
        elif isinstance(one, h5py.Dataset) and one.chunks:
            one.id.chunk_iter(lambda _: None)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
