"""How the processes of a group find each other, whatever else they have used their store for."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from contextlib import suppress
from hashlib import sha256

from ..errors import UsageError
from .connections import Store, part_of

__all__ = ["LOOK_EVERY", "START", "TOGETHER", "meet"]

_log = logging.getLogger("ckptsurg")

#: How long ranks wait for others to start, in seconds; after how long they say that they do; and how often they look.
START = 300.0
_PATIENCE = 10.0
LOOK_EVERY = 0.1
#: What to do where others do not come.
TOGETHER = "torchrun starts all ranks, and all call this alike; to run alone inside of one, unset TORCHELASTIC_RUN_ID"


def meet(store: Store, members: Sequence[int], me: int) -> Store:
    """A part of a store that is for these processes and this time alone, once all of them have come.

    It is counted by each process for each set of members: how many groups a process has made otherwise, and with whom,
    may differ from the others'.

    Args:
        store: By which the processes find each other.
        members: Their numbers there.
        me: That of this one.

    Raises:
        UsageError: if they do not come.
        RuntimeError: if the store is lost.
    """
    place = f"ckptsurg/{sha256(repr(list(members)).encode()).hexdigest()}"
    times = f"{place}/times/{me}"
    met = part_of(store, f"{place}/{store.add(times, 1)}")
    came, began, is_said = met.add("came", 1), time.monotonic(), False
    try:
        while came < len(members):
            waited = time.monotonic() - began
            if waited > START:
                reason = f"of {len(members)} ranks only {came} came within {START / 60:.0f} minutes"
                raise UsageError(reason, hint=TOGETHER)
            if waited > _PATIENCE and not is_said:
                _log.warning("waits for the other ranks: %d of %d are here; %s", came, len(members), TOGETHER)
                is_said = True
            time.sleep(LOOK_EVERY)
            came = met.add("came", 0)
    except BaseException:  # nor does who is interrupted count as one that came
        with suppress(RuntimeError):
            met.add("came", -1)
            store.add(times, -1)
        raise
    return met
