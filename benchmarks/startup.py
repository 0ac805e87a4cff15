"""What a command costs before it works, and what the headers of 100,000 tensors cost.

    python benchmarks/startup.py [ROUNDS]

Runs each command ROUNDS times (default 15), in turns, as a process of its own with its bytecode compiled, as after an
installation, and prints the median and least seconds of the whole process, and its largest resident memory. The small
checkpoint has 18 tensors; the large one is sparse with a true header, the names of a mixture of experts in one file.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from math import prod
from multiprocessing import Process
from pathlib import Path

SMALL_SPEC = """\
version: 1
freeze: ["**", "!fc"]
reinit:
  - {match: fc, init: default}
"""
LARGE_SPEC = """\
version: 1
drop: "model.layers[-1]"
freeze: ["**", "!lm_head", "!model.layers[60:].mlp.experts.{250..255}"]
reinit:
  - {match: lm_head, init: {normal: {std: 0.02}}}
  - {match: "model.layers[60:].mlp.experts.{250..255}.**.weight", init: {normal: {std: 0.02}}}
"""
COMMANDS = (
    "--help",
    "schema spec",
    "schema report",
    "inspect small.safetensors",
    "plan small.yaml small.safetensors",
    "verify out out",
    "inspect large.safetensors",
    "plan large.yaml large.safetensors",
)


def make_inputs(folder: Path) -> None:
    from patterns import names

    blocks = {f"layer{i}.{j}.{leaf}": [8, 8] for i in range(4) for j in range(2) for leaf in ("weight", "bias")}
    make(folder / "small.safetensors", {**blocks, "fc.weight": [10, 8], "fc.bias": [10]})
    make(folder / "large.safetensors", {name: [4, 4] if "scale" in name else [64, 64] for name in names()})
    (folder / "small.yaml").write_text(SMALL_SPEC)
    (folder / "large.yaml").write_text(LARGE_SPEC)


def make(path: Path, shapes: Mapping[str, Sequence[int]]) -> None:
    """A sparse file of BF16 tensors."""
    header: dict[str, object] = {}
    position = 0
    for name, shape in shapes.items():
        end = position + 2 * prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [position, end]}
        position = end
    body = json.dumps(header, separators=(",", ":")).encode()
    body += b" " * (-len(body) % 8)
    with path.open("wb") as file:
        file.write(len(body).to_bytes(8, "little") + body)
        file.truncate(8 + len(body) + position)


def run(arguments: Sequence[str], folder: Path) -> tuple[float, float]:
    """Seconds, and largest resident memory in megabytes, of one process."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    environment["PYTHONPYCACHEPREFIX"] = str(folder / "bytecode")
    begun = time.perf_counter()
    process = subprocess.Popen(arguments, cwd=folder, env=environment, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - begun
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(arguments)}: exit code {process.returncode}")
    return seconds, usage.ru_maxrss / 1e3  # kilobytes on Linux


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 15
    python = (sys.executable, "-c", "")
    measured: dict[str, list[tuple[float, float]]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        # In a process of its own: the memory of this one would count as that of those it starts.
        maker = Process(target=make_inputs, args=(folder,))
        maker.start()
        maker.join()
        ckptsurg = (sys.executable, "-m", "ckptsurg")
        run((*ckptsurg, "rewrite", "small.yaml", "small.safetensors", "-o", "out"), folder)
        commands = {"python itself": python} | {command: (*ckptsurg, *command.split()) for command in COMMANDS}
        for arguments in commands.values():  # compiles
            run(arguments, folder)
        for _ in range(rounds):
            for command, arguments in commands.items():
                measured[command].append(run(arguments, folder))
    print(f"{'command':36} {'median s':>9} {'least s':>9} {'memory MB':>10}")
    for command, runs in measured.items():
        seconds, memory = zip(*runs, strict=True)
        print(f"{command:36} {statistics.median(seconds):9.3f} {min(seconds):9.3f} {max(memory):10.0f}")


if __name__ == "__main__":
    main()
