"""Resident memory of a rewrite of a sparse checkpoint with a true header.

    python benchmarks/memory.py [GB] [FOLDER]

Makes a checkpoint of that size (default 12) with one tensor of half of it and the rest in blocks, drops a block, draws
a head, and prints the size, the time and the largest resident memory of the whole process.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SPEC = """\
version: 1
drop: blocks.3
freeze: ["**", "!head"]
reinit:
  - {match: head, init: {normal: {std: 0.02}}}
"""


def make(path: Path, size: int) -> None:
    """A sparse file: half of it one tensor, the other half sixteen blocks, and a head of 64 MB."""
    shapes = {"embed.weight": [size // 2 // 8192, 4096], "head.weight": [8192, 4096]}
    shapes |= {f"blocks.{i}.weight": [size // 32 // 8192, 4096] for i in range(16)}
    header, position = {}, 0
    for name, shape in shapes.items():
        end = position + shape[0] * shape[1] * 2
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [position, end]}
        position = end
    body = json.dumps(header).encode()
    body += b" " * (-len(body) % 8)
    with path.open("wb") as file:
        file.write(len(body).to_bytes(8, "little") + body)
        file.truncate(8 + len(body) + position)


def main() -> None:
    gigabytes = float(sys.argv[1]) if len(sys.argv) > 1 else 12.0
    with tempfile.TemporaryDirectory(dir=sys.argv[2] if len(sys.argv) > 2 else None) as folder:
        base, spec, out = Path(folder, "base.safetensors"), Path(folder, "spec.yaml"), Path(folder, "out")
        make(base, int(gigabytes * 1e9))
        spec.write_text(SPEC)
        begun = time.perf_counter()
        subprocess.run([sys.executable, "-m", "ckptsurg", "rewrite", spec, base, "-o", out], check=True)
        seconds = time.perf_counter() - begun
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e3  # kilobytes on Linux
    print(f"{gigabytes:g} GB: {seconds:.1f} s, {gigabytes / seconds:.2f} GB/s, largest resident memory {peak:.0f} MB")


if __name__ == "__main__":
    main()
