"""How fast patterns are matched: 100,000 names of a mixture-of-experts model against 50 patterns of every kind.

python benchmarks/patterns.py
"""

from __future__ import annotations

import statistics
import time

from ckptsurg.matching import Names

PATTERNS = [
    "**",
    "lm_head",
    "**.weight",
    "*.layers",
    "model.layers[-2:]",
    "model.layers[3:9].mlp.experts[-1]",
    "**.experts.*.{gate,up}_proj",
    "model.layers.{0..60}.mlp.experts.{1,2,3}",
    "**.mlp.**.weight_scale_inv",
    "re:.*\\.experts\\.25[0-5]\\..*",
]


def names() -> list[str]:
    found = ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
    for layer in range(66):
        for expert in range(256):
            for projection in ("gate_proj", "up_proj", "down_proj"):
                module = f"model.layers.{layer}.mlp.experts.{expert}.{projection}"
                found += [f"{module}.weight", f"{module}.weight_scale_inv"]
    return found[:100_000]


def main() -> None:
    given = names()
    seconds = []
    for _ in range(5):
        begun = time.perf_counter()
        space = Names(given)
        for pattern in PATTERNS * 5:
            space.match(pattern)
        seconds.append(time.perf_counter() - begun)
    print(f"{len(given):,} names x {5 * len(PATTERNS)} patterns: median {statistics.median(seconds):.2f} s")
    for pattern in PATTERNS:
        begun = time.perf_counter()
        count = space.count(pattern)
        print(f"  {pattern:45} {count:7,} tensors {1e3 * (time.perf_counter() - begun):7.1f} ms")


if __name__ == "__main__":
    main()
