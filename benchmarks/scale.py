"""What is planned of a checkpoint that nobody here has the disks for, and how the work is dealt out to ranks.

    python benchmarks/scale.py [ROUNDS] [FOLDER]

Makes checkpoints of DeepSeek-V3's shape, and of ten times that, sparse with true headers (220 MB of disk together).
Runs each command ROUNDS times (default 3) on both, and prints the median seconds of the whole process, its largest
resident memory, and how many times that of the smaller checkpoint the larger one takes. The spec drops one expert of
each layer, with what routes to it, and freezes the rest. Then, how the bytes of that rewrite are dealt out.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

from measuring.running import timed

if TYPE_CHECKING:
    from ckptsurg.checkpoints import Checkpoint
    from ckptsurg.dealing import Deal
    from ckptsurg.layout import OutputFile
    from ckptsurg.plans import Plan

SIZES = (1, 10)
RANKS = (1, 8, 64, 512)
SPEC = """\
version: 1
name: one-expert-less
drop: "model.layers.*.mlp.experts[-1]"
freeze: ["**", "!**.mlp.gate"]
reinit:
  - {match: "**.mlp.gate", shape: {0: 255}, keep: true, init: zeros, frozen: true} # the rows that are left
config:
  set: {n_routed_experts: 255, n_group: 1, topk_group: 1} # 255 do not fall into eight groups
"""
COMMANDS = ("inspect CKPT", "inspect CKPT --json", "plan SPEC CKPT", "plan SPEC CKPT --json")


def laid_out(plan: Plan, base: Checkpoint) -> Sequence[OutputFile]:
    """The files of a rewrite."""
    from ckptsurg.layout import lay_out

    return lay_out(plan.output, base, single=None, max_shard_size=None).files


def cut(files: Sequence[OutputFile], dealt: Deal) -> set[str]:
    """The tensors that are in several shares."""
    begins: dict[str, list[int]] = defaultdict(list)
    for share in dealt.shares:
        for name, part in share.items():
            begins[name].append(part.start)
    found = set()
    for file in files:
        ends = list(accumulate((tensor.info.nbytes for tensor in file.tensors), initial=len(file.header)))
        for begin in begins[file.name]:
            after = bisect_right(ends, begin)
            if after and begin != ends[after - 1]:
                found.add(file.tensors[after - 1].output_name)
    return found


def print_commands(spec: Path, folders: Sequence[Path], rounds: int) -> None:
    headings = "".join(f"{_size(folder):>12} {'memory MB':>10}" for folder in folders)
    print(f"{'command':24}{headings} {'times':>8} {'times':>6}")
    ckptsurg = Path(sys.executable).with_name("ckptsurg")  # as it was installed beside this Python
    for command in COMMANDS:
        found: list[tuple[float, float]] = []
        for folder in folders:
            paths = {"SPEC": str(spec), "CKPT": str(folder)}
            arguments = [str(ckptsurg), *(paths.get(word, word) for word in command.split())]
            runs = [timed(arguments) for _ in range(rounds)]
            found.append((statistics.median(run.seconds for run in runs), max(run.memory for run in runs) / 1e6))
        (seconds, memory), (most_seconds, most_memory) = found[0], found[-1]
        row = "".join(f"{one:10.2f} s {megabytes:10.0f}" for one, megabytes in found)
        print(f"{command:24}{row} {most_seconds / seconds:8.1f} {most_memory / memory:6.1f}", flush=True)


def print_deals(spec: Path, folder: Path) -> None:
    import ckptsurg
    from ckptsurg.dealing import deal

    with ckptsurg.open_checkpoint(folder) as base:
        plan = ckptsurg.plan(spec, base)
        begun = time.perf_counter()
        files = laid_out(plan, base)
        seconds = time.perf_counter() - begun
    size, same = sum(file.size for file in files), sum(file.untouched is not None for file in files)
    print(
        f"\n{size / 1e9:,.0f} GB in {len(files):,} files, of which {same:,} stay as they are; laid out: {seconds:.2f} s"
    )
    print(
        f"{'ranks':>6} {'GB a rank':>10} {'most / mean':>12} {'files at most':>14} {'tensors cut':>12} {'dealt in':>10}"
    )
    for ranks in RANKS:
        begun = time.perf_counter()
        dealt = deal(files, ranks, base.extents)
        seconds = time.perf_counter() - begun
        print(
            f"{ranks:6,} {size / ranks / 1e9:10.2f} {dealt.unevenness:12.4f} {max(map(len, dealt.shares)):14,} "
            f"{len(cut(files, dealt)):12,} {seconds:8.2f} s",
            flush=True,
        )


def _size(folder: Path) -> str:
    return f"{sum(path.stat().st_size for path in folder.glob('*.safetensors')) / 1e9:,.0f} GB"


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    maker = Path(__file__).parent / "measuring" / "deepseek.py"
    with tempfile.TemporaryDirectory(dir=sys.argv[2] if len(sys.argv) > 2 else None) as temporary:
        spec = Path(temporary, "spec.yaml")
        spec.write_text(SPEC)
        folders = [Path(temporary, f"times-{times}") for times in SIZES]
        for times, folder in zip(SIZES, folders, strict=True):
            # In a process of its own: the memory of this one would count as that of those it starts.
            subprocess.run([sys.executable, maker, folder, str(times)], check=True)
        print_commands(spec, folders, rounds)
        for folder in folders:
            print_deals(spec, folder)


if __name__ == "__main__":
    main()
