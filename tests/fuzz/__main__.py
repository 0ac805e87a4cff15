"""python -m tests.fuzz [TARGET]... [--seconds 60]: every target, or those named, in so many seconds in all.

As many targets at once as there are processors. The exit code is 1 if something was found; the input is shown and
stands in build/fuzz, and `python -m tests.fuzz TARGET --input FILE` tries it again.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import sha1
from importlib import import_module
from pathlib import Path

from . import TARGETS
from .checking import Finding, Target, configure

OUTPUT = Path("build", "fuzz")
#: Beside the fuzzing itself, in seconds: the start of a worker, and its last input.
GRACE = 300


@dataclass(frozen=True)
class Outcome:
    """What came of one worker.

    Attributes:
        name: Of its target.
        failure: What it found, as its last words; empty for nothing.
        summary: How much it tried.
    """

    name: str
    failure: str
    summary: str


def main() -> int:
    arguments = _arguments()
    if arguments.input:
        return _again(arguments.targets, arguments.input)
    jobs = arguments.jobs or os.cpu_count() or 1
    rounds = math.ceil(len(arguments.targets) / jobs)
    limit = f"-runs={arguments.runs}" if arguments.runs else f"-max_total_time={max(1, arguments.seconds // rounds)}"
    flags = [limit, f"-seed={arguments.seed}", *(["--bytes-only"] if arguments.bytes_only else [])]
    with ThreadPoolExecutor(jobs) as pool:
        outcomes = list(pool.map(lambda name: _fuzz(name, flags, arguments.seconds), arguments.targets))
    for outcome in outcomes:
        print(f"{outcome.name:>9}: {outcome.failure or outcome.summary}", flush=True)  # noqa: T201
    return 1 if any(outcome.failure for outcome in outcomes) else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("targets", nargs="*", default=TARGETS, metavar="TARGET", help=", ".join(TARGETS))
    parser.add_argument("--seconds", type=int, default=60, help="how long, all targets together")
    parser.add_argument("--runs", type=int, help="how many inputs a target, in place of a time")
    parser.add_argument("--seed", type=int, default=0, help="of all that is random; 0 for another each time")
    parser.add_argument("--jobs", type=int, help="how many targets at once")
    parser.add_argument("--bytes-only", action="store_true", help="mutate bytes alone: no words, no documents")
    parser.add_argument("--input", type=Path, help="try one input, without fuzzing")
    return parser.parse_args()


def _fuzz(name: str, flags: list[str], seconds: int) -> Outcome:
    OUTPUT.mkdir(parents=True, exist_ok=True)
    target: Target = import_module(f"{__package__}.{name}").TARGET
    shared_memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shared_memory if shared_memory.is_dir() else None) as home:
        corpus, words = Path(home, "corpus"), Path(home, "words")
        corpus.mkdir()
        for seed in target.seeds:
            (corpus / sha1(seed, usedforsecurity=False).hexdigest()).write_bytes(seed)
        words.write_text("".join(f'"{_escaped(word)}"\n' for word in target.words))
        if "--bytes-only" not in flags:
            flags = [*flags, f"-dict={words}"]
        log = OUTPUT / f"{name}.log"
        command = [sys.executable, "-m", f"{__package__}.worker", name, *flags, f"-artifact_prefix={OUTPUT}/{name}-"]
        command += ["-timeout=60", "-rss_limit_mb=2048", "-print_final_stats=1", str(corpus)]
        with log.open("wb") as output:
            environment = {**os.environ, "TMPDIR": home}
            try:
                code = subprocess.run(
                    command, stdout=output, stderr=output, env=environment, timeout=seconds + GRACE, check=False
                ).returncode
            except subprocess.TimeoutExpired:
                code = -1
    return _judged(name, code, log.read_text("utf-8", "replace"))


def _judged(name: str, code: int, log: str) -> Outcome:
    starts, ends = (re.search(rf"{word}\s+cov: (\d+) ft: (\d+)", log) for word in ("INITED", "DONE"))
    runs = re.search(r"number_of_executed_units: (\d+)", log)
    if code == 0 and starts and ends and runs:
        seconds = re.search(r"in (\d+) second", log)
        coverage = f"coverage {starts[1]} to {ends[1]}, features {starts[2]} to {ends[2]}"
        return Outcome(name, "", f"{int(runs[1]):,} inputs in {seconds[1] if seconds else 0} s; {coverage}")
    raised = re.search(r"=== Uncaught Python exception: ===\n(.*?)\n\n", log, re.DOTALL)
    lines = [f"FAILED with code {code}", raised[1] if raised else "\n".join(log.splitlines()[-40:])]
    if saved := re.search(r"Test unit written to (\S+)", log):
        data = Path(saved[1]).read_bytes()
        lines += [f"input: {data!r}", f"again: python -m tests.fuzz {name} --input {saved[1]}"]
    return Outcome(name, "\n".join(lines), "")


def _again(targets: list[str], path: Path) -> int:
    configure(traced_every=1)
    [name] = targets
    try:
        import_module(f"{__package__}.{name}").TARGET.holds(path.read_bytes())
    except Finding as finding:
        print(finding)  # noqa: T201
        return 1
    return 0


def _escaped(word: str) -> str:
    return "".join(f"\\x{byte:02x}" for byte in word.encode("utf-8", "surrogatepass"))


if __name__ == "__main__":
    sys.exit(main())
