"""How fast a tensor's fingerprint is, beside other ways to see that it has not changed.

    python benchmarks/fingerprint.py [MB]

For float32 and bfloat16 tensors of that size (default 256), on the CPU and on CUDA where there is one: medians over
rounds in which the ways take turns. GB/s are of the tensor's bytes, once. The last column is the time in copies of the
tensor to another place on its device.
"""

from __future__ import annotations

import importlib.util
import shutil
import statistics
import sys
import time
from collections.abc import Callable

import torch

from ckptsurg.frameworks.pytorch import TorchTensors
from ckptsurg.integrations.pytorch.fingerprint import fingerprints
from ckptsurg.tensors import digest_of

ROUNDS = 7
BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16}


def ways(tensor: torch.Tensor) -> dict[str, Callable[[], object]]:
    """What is measured, by what it is called; each waits until its answer is on the host, or done."""
    kept, given = tensor.clone(), {"t": tensor}
    source, bits = TorchTensors(given, "benchmark"), BITS[tensor.dtype]
    found: dict[str, Callable[[], object]] = {
        "copy": lambda: kept.copy_(tensor),
        "fingerprint, eager": lambda: fingerprints(given, compiled=False),
    }
    if shutil.which("g++") if tensor.device.type == "cpu" else importlib.util.find_spec("triton"):
        found["fingerprint, compiled"] = lambda: fingerprints(given, compiled=True)
    found["compare bits with a kept copy"] = lambda: torch.equal(tensor.view(bits), kept.view(bits))
    found["torch.equal with a kept copy"] = lambda: torch.equal(tensor, kept)
    if hasattr(torch, "hash_tensor"):
        found["torch.hash_tensor"] = lambda: torch.hash_tensor(tensor).item()
    found["digest, blake3"] = lambda: digest_of(source.read("t"), "blake3")
    found["digest, sha256"] = lambda: digest_of(source.read("t"), "sha256")
    return found


def measured(tensor: torch.Tensor) -> dict[str, float]:
    """Median seconds of each way."""
    taken: dict[str, list[float]] = {}
    choices = ways(tensor)
    for turn in range(ROUNDS + 1):
        for name, way in choices.items():
            _wait(tensor.device)
            begun = time.perf_counter()
            way()
            _wait(tensor.device)
            if turn:  # the first compiles, and fills caches
                taken.setdefault(name, []).append(time.perf_counter() - begun)
    return {name: statistics.median(seconds) for name, seconds in taken.items()}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> None:
    megabytes = float(sys.argv[1]) if len(sys.argv) > 1 else 256.0
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {megabytes:g} MB, {ROUNDS} rounds")
    print(f"{'device':6} {'dtype':9} {'':30} {'ms':>9} {'GB/s':>8} {'copies':>8}")
    for device in devices:
        for dtype in BITS:
            tensor = torch.randn(int(megabytes * 1e6) // dtype.itemsize, dtype=dtype, device=device)
            seconds = measured(tensor)
            for name, each in seconds.items():
                speed, copies = tensor.nbytes / each / 1e9, each / seconds["copy"]
                kind = str(dtype).removeprefix("torch.")
                print(f"{device:6} {kind:9} {name:30} {1e3 * each:9.2f} {speed:8.2f} {copies:8.2f}", flush=True)


if __name__ == "__main__":
    main()
