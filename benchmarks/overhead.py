"""What watching costs: the overhead per training step of each tier, on a ResNet50 and a small Llama.

    python benchmarks/overhead.py [ROUNDS]

In each round a step is timed unwatched and under each tier, one after the other; the figures are medians over rounds.
Beside it stands what a proof of all digests takes, as at a save and at the end.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

import ckptsurg

sys.path.insert(0, str(Path(__file__).parent.parent))

TIERS = {"flags, groups, gradients": None, "and frozen tensors read": 1}


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def resnet50() -> tuple[torch.nn.Module, str, Callable[[torch.nn.Module], torch.Tensor], str]:
    from tests.architectures import resnet50

    batch = 256 if _device().type == "cuda" else 16
    x, y = torch.randn(batch, 3, 224, 224, device=_device()), torch.arange(batch, device=_device()) % 10
    model = resnet50(10).to(_device())
    return model, "fc", lambda m: torch.nn.functional.cross_entropy(m(x), y), f"ResNet50, batch {batch} of 224 x 224"


def llama() -> tuple[torch.nn.Module, str, Callable[[torch.nn.Module], torch.Tensor], str]:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=8192, hidden_size=512, intermediate_size=1536, num_hidden_layers=8, num_attention_heads=8
    )
    length = 4096 if _device().type == "cuda" else 512
    tokens = torch.randint(0, 8192, (2, length), device=_device())
    model = LlamaForCausalLM(config).to(_device())
    count = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    name = f"Llama of {count:.0f} M parameters, 2 x {length} tokens"
    return model, "lm_head", lambda m: m(input_ids=tokens, labels=tokens).loss, name


def _seconds(act: Callable[[], object]) -> float:
    if _device().type == "cuda":
        torch.cuda.synchronize()
    begun = time.perf_counter()
    act()
    if _device().type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begun


def measure(
    model: torch.nn.Module, head: str, loss: Callable[[torch.nn.Module], torch.Tensor], rounds: int
) -> Iterator[tuple[str, float, float]]:
    """Seconds a step, and the seconds of it that a guard says it took, for each tier."""
    frozen = ckptsurg.freeze(model, ckptsurg.make_manifest(["**", f"!{head}"], model))
    optimizer = torch.optim.AdamW(frozen.trainable_parameters(), lr=1e-4)

    def step() -> None:
        model.train()
        optimizer.zero_grad()
        loss(model).backward()
        optimizer.step()

    step()
    plain: list[float] = []
    watched: dict[str, list[float]] = {tier: [] for tier in TIERS}
    own: dict[str, list[float]] = {tier: [] for tier in TIERS}
    for _ in range(rounds):
        plain.append(_seconds(step))
        for tier, every in TIERS.items():
            guard = frozen.guard(optimizer, every=every)
            watched[tier].append(_seconds(step))
            own[tier].append(guard.seconds)
            guard.remove()
    yield "unwatched", statistics.median(plain), 0.0
    for tier in TIERS:
        yield tier, statistics.median(watched[tier]), statistics.median(own[tier])
    proofs = [_seconds(frozen.verify) for _ in range(3)]
    yield "all digests, once", statistics.median(plain), statistics.median(proofs)


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 7
    for make in (resnet50, llama):
        model, head, loss, name = make()
        print(f"{name}; {_device()}, {torch.get_num_threads()} threads")
        print(f"  {'tier':<26} {'step':>10} {'of it watching':>15} {'share':>8}")
        for tier, seconds, watching in measure(model, head, loss, rounds):
            print(f"  {tier:<26} {seconds * 1e3:>7.1f} ms {watching * 1e3:>12.2f} ms {watching / seconds:>8.2%}")


if __name__ == "__main__":
    main()
