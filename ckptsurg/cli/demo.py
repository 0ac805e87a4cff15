"""The demo: the main job on real data, and the same job as tutorials show it.

A small convolutional network with batch normalisation learns the digits 0 to 4 of scikit-learn's data set, is
rewritten for the digits 5 to 9 and fine-tuned: once frozen by its manifest, once by a loop over ``requires_grad``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import safetensors.torch
import torch
from sklearn.datasets import load_digits
from torch import nn

from .. import api, proofs, training
from ..errors import CkptsurgError, UsageError
from ..wording import shown
from . import planned, rendering

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from ..report import Report

__all__ = ["run"]

SPEC = """\
version: 1
name: digits-five-to-nine

freeze: ["**", "!head"]   # everything keeps its bits, but for the head

reinit:
  - match: head           # which is drawn anew for the new digits
    shape: {0: 5}
    init: default
"""


class Digits(nn.Module):
    """Images [N, 1, 8, 8] to scores [N, classes]."""

    def __init__(self, classes: int = 5) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.conv2, self.bn2 = nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32)
        self.head = nn.Linear(32 * 4 * 4, classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        hidden = torch.relu(self.bn1(self.conv1(images)))
        hidden = torch.relu(self.bn2(self.conv2(hidden)))
        scores: torch.Tensor = self.head(nn.functional.max_pool2d(hidden, 2).flatten(1))
        return scores


_Split = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def _split(first: int) -> _Split:
    """Training and test images and labels of the five digits from ``first`` on; every fifth image is for the test."""
    images, labels = load_digits(return_X_y=True)
    chosen = (labels >= first) & (labels < first + 5)
    x = torch.tensor(images[chosen], dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
    y = torch.tensor(labels[chosen] - first, dtype=torch.int64)
    test = torch.arange(len(x)) % 5 == 0
    return x[~test], y[~test], x[test], y[test]


def _train(model: nn.Module, parameters: Iterable[nn.Parameter], data: _Split, epochs: int) -> float:
    """Train, and give the accuracy on the test images."""
    x, y, test_x, test_y = data
    optimizer = torch.optim.AdamW(parameters, lr=3e-3, weight_decay=0.01)
    for _ in range(epochs):
        model.train()
        for batch in torch.split(torch.randperm(len(x)), 64):
            optimizer.zero_grad()
            torch.autograd.backward(nn.functional.cross_entropy(model(x[batch]), y[batch]))
            optimizer.step()
    model.eval()
    with torch.no_grad():
        return float((model(test_x).argmax(1) == test_y).float().mean())


def run(folder: Path, *, as_json: bool = False) -> None:
    """Run the demo in a folder, which is made.

    Args:
        folder: Where the files go; it must not exist or be empty.
        as_json: Whether to print the two reports alone.

    Raises:
        UsageError: if the folder is not empty.
    """

    def say(text: str) -> None:
        if not as_json:
            print(text, flush=True)

    def show(result: Callable[[], None]) -> None:
        if not as_json:
            result()
            print(flush=True)

    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{shown(folder)}: exists and is not empty", hint="choose another folder, or remove it")
    folder.mkdir(parents=True, exist_ok=True)
    base, spec, out = folder / "base.safetensors", folder / "spec.yaml", folder / "out"
    state = torch.random.get_rng_state()
    try:
        torch.manual_seed(0)
        say("1. A network with batch normalisation learns the digits 0 to 4.")
        model = Digits()
        learnt = _train(model, model.parameters(), _split(0), epochs=12)
        safetensors.torch.save_file(model.state_dict(), base, {"format": "pt"})
        say(f"   {learnt:.1%} of the test images are right; saved as {shown(base)}\n")

        say("2. A spec says what becomes of it for the digits 5 to 9.\n")
        spec.write_text(SPEC)
        say("".join(f"   {line}\n" for line in SPEC.splitlines()))
        say(f"$ ckptsurg plan {shown(spec)} {shown(base)}")
        document, plan = api.plan_with_spec(spec, base)
        show(lambda: planned.show_plan(document, plan))
        say(f"$ ckptsurg rewrite {shown(spec)} {shown(base)} -o {shown(out)}")
        manifest = api.rewrite(spec, base, out)
        show(lambda: rendering.show_manifest(manifest, out, None))
        say("3. Fine-tuned with the manifest: ckptsurg.freeze(model, manifest)")
        good = folder / "trained.safetensors"
        model = Digits()
        model.load_state_dict(safetensors.torch.load_file(out / "model.safetensors"))
        frozen = training.freeze(model, manifest)
        accuracy = _train(model, frozen.trainable_parameters(), _split(5), epochs=12)
        safetensors.torch.save_file(model.state_dict(), good, {"format": "pt"})
        say(f"   {accuracy:.1%} of the test images are right\n")
        kept = _verify(out, good, say, show)

        say("4. Fine-tuned as tutorials show it: for p in model.parameters(): p.requires_grad = False")
        bad = folder / "tutorial.safetensors"
        model = Digits()
        model.load_state_dict(safetensors.torch.load_file(out / "model.safetensors"))
        for name, parameter in model.named_parameters():
            parameter.requires_grad = name.startswith("head")
        accuracy = _train(model, (p for p in model.parameters() if p.requires_grad), _split(5), epochs=12)
        safetensors.torch.save_file(model.state_dict(), bad, {"format": "pt"})
        say(f"   {accuracy:.1%} of the test images are right\n")
        moved = _verify(out, bad, say, show)
    finally:
        torch.random.set_rng_state(state)
    if as_json:
        print(json.dumps({"frozen": json.loads(kept.to_json()), "tutorial": json.loads(moved.to_json())}, indent=1))
    if learnt < 0.95 or not kept.ok or moved.ok:
        raise CkptsurgError("the demo did not show what it should; please report this")


def _verify(out: Path, trained: Path, say: Callable[[str], None], show: Callable[[Callable[[], None]], None]) -> Report:
    report = proofs.verify(out / "freeze.json", trained, baseline=out)
    say(f"$ ckptsurg verify {shown(out / 'freeze.json')} {shown(trained)} --baseline {shown(out)}")
    show(lambda: rendering.show_report(report))
    return report
