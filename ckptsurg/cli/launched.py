"""The other processes of a command that ``torchrun`` has started."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from ..errors import CkptsurgError, PeerFailed, SystemFailure
from ..ranks import ALONE, Ranks
from . import SIGNALS

__all__ = ["launched"]


@contextmanager
def launched() -> Iterator[Ranks]:
    """The ranks that ``torchrun`` has started with this one; without it this process alone.

    Of what makes all of them stop, the rank where it was and the first one speak.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield ALONE
        return
    try:
        with _signals_later():  # torch has C++ import NumPy, and drops whatever is raised there
            from ..ranks.process_group import joined
    except ModuleNotFoundError as error:
        raise SystemFailure(f"the ranks of torchrun cannot be joined: {error}") from None
    rank = int(os.environ["RANK"])
    try:
        with joined() as ranks:
            if rank != 0:
                logging.getLogger("ckptsurg").setLevel(logging.ERROR)  # what there is to note, the first rank says
            yield ranks
    except PeerFailed as error:
        if rank != 0:
            sys.exit(error.exit_code)
        raise
    except CkptsurgError as error:
        if rank != 0:
            error.message = f"rank {rank}: {error.message}"
        raise


@contextmanager
def _signals_later() -> Iterator[None]:
    """Have signals that stop a command come after this."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
