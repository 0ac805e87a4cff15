"""What processes under torchrun gain on one machine, and what that says of many machines.

    python benchmarks/ranks.py [--sizes 1,4,8] [--rounds 3] [--folder build/ranks]

Makes checkpoints of so many GB (10^9 bytes) in shards of half a GB, and one of 92,000 tensors of 16 bytes. Rewrites and
verifies each as one process, with one thread and with one for each processor, and under torchrun as one, two and four
processes, the processors dealt out to them; every command once a round in an order by chance, whole processes from
before they start. The checkpoints are not in the page cache, Python and torch are; rewrites end on disk. Prints
medians, over those of one process with all threads; then the cost model that is fitted to them, how far it is off, and
what it says of 1 to 512 machines. The model and its assumptions are in docs/scale.md.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from measuring.running import timed

SHARD_BYTES = 500_000_000
TENSOR_BYTES = 12_500_000
MANY = 92_000
SPEC = 'version: 1\nfreeze: ["**", "!layers.0"]\ncast: [{match: layers.0, dtype: F32}]\n'
TORCHRUN = ("-m", "torch.distributed.run", "--nproc-per-node")
#: Processes and threads of each; no processes for the command by itself.
WAYS = {
    "1 process, 1 thread": (0, 1),
    "1 process": (0, None),
    "torchrun, 1": (1, None),
    "torchrun, 2": (2, None),
    "torchrun, 4": (4, None),
}
CORES = len(os.sched_getaffinity(0))


@dataclass(frozen=True)
class Model:
    """Seconds of a job: ``start + each * tensors + most / min(cores * rate, disk)``.

    Attributes:
        start: What torchrun and the processes need to begin and to end, in seconds.
        each: What the first rank does for each tensor, in seconds.
        rate: What a core reads and hashes, and writes where that is asked, in bytes a second.
        disk: What the disk or network of a machine takes, in bytes a second.
    """

    start: float
    each: float
    rate: float
    disk: float

    def seconds(self, nbytes: float, tensors: int, cores: int, disk: float | None = None) -> float:
        """Of a job whose busiest machine has so many bytes."""
        return self.start + self.each * tensors + nbytes / min(cores * self.rate, disk or self.disk)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=lambda text: [float(one) for one in text.split(",")], default=[1.0, 4.0, 8.0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path("build/ranks"))
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # as torchrun sets it, and says at length
    try:
        measured = measure(options.sizes, options.rounds, options.folder)
    finally:
        shutil.rmtree(options.folder)
    report(measured, options.sizes)


# --- Measuring --------------------------------------------------------------------------------------


def measure(sizes: list[float], rounds: int, folder: Path) -> dict[tuple[str, float, str], float]:
    """Median seconds by command, GB (0 for the many small tensors) and way."""
    spec = folder / "spec.yaml"
    spec.write_text(SPEC)
    jobs = []
    for size in [0.0, *sizes]:
        base = folder / f"base-{size:g}"
        make(base, size)
        published = folder / f"published-{size:g}"
        rewrite = [sys.executable, "-m", "ckptsurg", "rewrite", str(spec), str(base), "-o", str(published)]
        subprocess.run(rewrite, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for way in WAYS:
            jobs.append(("rewrite", size, way, ["rewrite", str(spec), str(base), "-o", str(folder / "out")]))
            jobs.append(("verify", size, way, ["verify", str(published), str(published)]))
    seconds: dict[tuple[str, float, str], list[float]] = defaultdict(list)
    chance = random.Random(0)
    for number in range(rounds + 1):
        for command, size, way, arguments in chance.sample(jobs, len(jobs)):
            shutil.rmtree(folder / "out", ignore_errors=True)
            forget(folder)
            processes, threads = WAYS[way]
            launched = [*TORCHRUN, str(processes)] if processes else []
            limited = ["--jobs", str(threads)] if threads else []
            found = timed([sys.executable, *launched, "-m", "ckptsurg", *arguments, *limited])
            if number:  # the first round warms up what is not emptied
                seconds[command, size, way].append(found.seconds)
    return {key: statistics.median(each) for key, each in seconds.items()}


def forget(folder: Path) -> None:
    """Have nothing of a folder's files in the page cache."""
    os.sync()
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def make(folder: Path, gigabytes: float) -> None:
    """A checkpoint of random bytes; of no gigabytes, the one of many small tensors."""
    import numpy as np
    from safetensors.numpy import save_file

    folder.mkdir()
    count, width = (round(gigabytes * 1e9 / TENSOR_BYTES), TENSOR_BYTES) if gigabytes else (MANY, 16)
    a_shard = SHARD_BYTES // TENSOR_BYTES if gigabytes else MANY // 160
    places = {}
    drawn = np.random.default_rng(0)
    for shard, first in enumerate(range(0, count, a_shard)):
        names = [f"layers.{number}.weight" for number in range(first, min(first + a_shard, count))]
        name = f"model-{shard + 1:05d}.safetensors"
        bits = (drawn.integers(0, 2**15, width // 2, np.uint16) for _ in names)
        save_file({one: each.view(np.float16) for one, each in zip(names, bits, strict=True)}, folder / name)
        places |= dict.fromkeys(names, name)
    index = {"metadata": {"total_size": count * width}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


# --- The model --------------------------------------------------------------------------------------


def fitted(measured: dict[tuple[str, float, str], float], command: str, sizes: list[float]) -> Model:
    """The model of a command: what is added by size is its rate, what is left its start."""
    small, large = min(sizes), max(sizes)
    slope = {way: (measured[command, large, way] - measured[command, small, way]) / (large - small) for way in WAYS}
    rate = 1e9 / slope["1 process, 1 thread"]
    disk = 1e9 / min(slope.values())
    several = ("torchrun, 2", "torchrun, 4")
    start = statistics.mean(measured[command, small, way] - small * slope[way] for way in several)
    each = statistics.mean(measured[command, 0.0, way] - start for way in several) / MANY
    return Model(start, max(each, 0.0), rate, disk)


def report(measured: dict[tuple[str, float, str], float], sizes: list[float]) -> None:
    for command in ("rewrite", "verify"):
        print(f"\n{command:22}", *(f"{f'{size:g} GB' if size else f'{MANY:,} tensors':>24}" for size in [0.0, *sizes]))
        for way in WAYS:
            row = []
            for size in [0.0, *sizes]:
                seconds = measured[command, size, way]
                row.append(f"{seconds:15.2f} s {seconds / measured[command, size, '1 process']:6.2f}")
            print(f"{way:22}", *row)
        model = fitted(measured, command, sizes)
        print(
            f"model: start {model.start:.1f} s, {1e5 * model.each:.1f} s for 100,000 tensors, "
            f"{model.rate / 1e9:.2f} GB/s a core, {model.disk / 1e9:.2f} GB/s a machine"
        )
        for way, processes in (("torchrun, 2", 2), ("torchrun, 4", 4)):
            for size in sizes:
                says = model.seconds(size * 1e9, 0, min(processes, CORES))
                print(f"  {way}, {size:g} GB: says {says:.1f} s, took {measured[command, size, way]:.1f} s")
        foretell(model, command)


def foretell(model: Model, command: str) -> None:
    """DeepSeek-V3 on machines of 32 such cores, and a network that takes 3 GB/s in each direction."""
    nbytes, tensors, network, cores = 686e9, 91_637, 3.0e9, 32
    for machines in (1, 8, 64, 512):
        share = 1.005 * nbytes / machines
        seconds = model.seconds(share, tensors, cores, disk=network)
        alone = model.seconds(nbytes, tensors, cores, disk=network)
        print(f"  {machines:4} machines: {seconds:8.1f} s, {alone / seconds:6.1f} times as fast as one")


if __name__ == "__main__":
    main()
