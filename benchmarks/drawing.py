"""How fast initial values are drawn: nanoseconds an element and gigabytes a second, by one thread and by all cores.

    python benchmarks/drawing.py [MILLIONS]

Draws so many million elements (default 32) of each kind, in as many equal ranges of one tensor as there are threads,
and prints medians of five rounds. What is drawn is not kept; zeros are made once and handed on again and again.
"""

from __future__ import annotations

import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor

from ckptsurg.initializer_arguments import Initializer
from ckptsurg.initializers import Drawing
from ckptsurg.parallel import available_jobs
from ckptsurg.tensors import TensorInfo

KINDS: dict[str, dict[str, float | str]] = {
    "normal": {"mean": 0.0, "std": 0.02},
    "uniform": {"a": 0.0, "b": 1.0},
    "trunc_normal": {"mean": 0.0, "std": 1.0, "a": -2.0, "b": 2.0},
    "kaiming_uniform": {"a": 0.0, "mode": "fan_in", "nonlinearity": "leaky_relu"},
    "zeros": {},
}
ROUNDS = 5
COLUMNS = 1000


def seconds(drawing: Drawing, elements: int, threads: int) -> float:
    def draw(thread: int) -> None:
        for _ in drawing.read(elements * thread // threads, elements * (thread + 1) // threads):
            pass

    taken = []
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(ROUNDS + 1):  # the first one touches memory for the first time
            begun = time.perf_counter()
            list(pool.map(draw, range(threads)))
            taken.append(time.perf_counter() - begun)
    return statistics.median(taken[1:])


def main() -> None:
    elements = int(float(sys.argv[1]) * 1e6) if len(sys.argv) > 1 else 32_000_000
    elements -= elements % COLUMNS
    cores = available_jobs()
    print(f"{'':23}{'1 thread':>23}{f'{cores} threads':>23}")
    for name, arguments in KINDS.items():
        for dtype in ("BF16", "F32"):
            info = TensorInfo(dtype, (elements // COLUMNS, COLUMNS))
            drawing = Drawing(0, "head.weight", info, Initializer(name=name, arguments=arguments))
            row = f"{name:17}{dtype:6}"
            for threads in (1, cores):
                taken = seconds(drawing, elements, threads)
                row += f"{1e9 * taken / elements:8.2f} ns{info.nbytes / taken / 1e9:7.2f} GB/s"
            print(row, flush=True)


if __name__ == "__main__":
    main()
