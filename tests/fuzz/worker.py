"""One process that fuzzes one target; flags are libFuzzer's (https://llvm.org/docs/LibFuzzer.html#options).

python -m tests.fuzz.worker TARGET [--bytes-only] [FLAG]... [FOLDER OF INPUTS]
"""

from __future__ import annotations

import random
import sys
from contextlib import suppress
from importlib import import_module

import atheris

from .checking import COUNTING, MAX_INPUT, Target, configure, unlimited


def main(name: str, *flags: str) -> None:
    # What is imported late is imported while the seeds are read, and must be instrumented too.
    with atheris.instrument_imports(include=["ckptsurg"], enable_loader_override=False), unlimited():
        target: Target = import_module(f"{__package__}.{name}").TARGET
        for seed in target.seeds:
            target.holds(seed)
    configure(slowdown=COUNTING)
    bytes_only = "--bytes-only" in flags
    flags = tuple(flag for flag in flags if flag != "--bytes-only")

    def mutate(data: bytes, limit: int, seed: int) -> bytes:
        rng = random.Random(seed)
        changed = None
        if target.mutate is not None and rng.random() < 0.6:
            with suppress(RecursionError):  # what is nested so deep is left to bytes
                changed = target.mutate(data, rng)
        if changed is None or len(changed) > limit:
            return bytes(atheris.Mutate(data, limit))
        return changed

    custom = {} if target.mutate is None or bytes_only else {"custom_mutator": mutate}
    atheris.Setup([sys.argv[0], f"-max_len={MAX_INPUT}", *flags], target.holds, **custom)
    atheris.Fuzz()


if __name__ == "__main__":
    main(*sys.argv[1:])
