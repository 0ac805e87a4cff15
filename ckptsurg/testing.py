"""Assertions for tests: weights that must not move, and weights that must be the same."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from . import api
from .causes import CAUSES
from .coercing import ManifestLike, TensorsLike
from .errors import FrozenWeightsChanged
from .renaming import Renaming
from .report import Detail, Difference, Report
from .wording import counted, shown

if TYPE_CHECKING:
    import torch

    from .integrations.pytorch import Watch

__all__ = ["assert_bit_identical", "frozen_weights"]

_ROWS = 20


def assert_bit_identical(a: TensorsLike, b: TensorsLike) -> None:
    """Assert that two checkpoints, models or state dicts hold the same tensors with the same bits.

    Args:
        a: What is expected: a path, a model or a state dict.
        b: What is there.

    Raises:
        AssertionError: with a table of what differs, where and by how much.
        UsageError: if there is nothing at a path.
        CheckpointError: if a checkpoint is malformed.
    """
    __tracebackhide__ = True
    report = api.diff(a, b)
    if not report.ok:
        raise AssertionError(f"{counted(len(report.tensors))} not bit-identical:\n{table(report.tensors)}")


@contextmanager
def frozen_weights(
    model: torch.nn.Module,
    freeze: str | Iterable[str | Mapping[str, Any]] | None = None,
    *,
    manifest: ManifestLike | None = None,
    names: Renaming | None = None,
    expect_trained: bool = False,
) -> Iterator[Watch]:
    """Assert that what happens in the ``with`` leaves frozen weights as they are; the model is only watched.

    Args:
        model: The model.
        freeze: Patterns of what must not move: ``["**", "!fc"]``.
        manifest: Instead of patterns, a manifest or its path.
        names: From the model's names to the manifest's, where they differ.
        expect_trained: Whether each trainable tensor has to move.

    Raises:
        FrozenWeightsChanged: with a table of what moved, where, by how much, and why.
        CkptsurgError: if patterns, manifest and model do not fit.
    """
    __tracebackhide__ = True
    watch = api.watch(model, freeze, manifest=manifest, names=names, expect_trained=expect_trained)
    try:
        with watch:
            yield watch
    except FrozenWeightsChanged as error:
        if watch.report is None or watch.report.ok:  # somebody else's
            raise
        raise FrozenWeightsChanged(_explained(watch.report), causes=error.causes) from None


def _explained(report: Report) -> str:
    if not report.drifted:
        return report.summary()
    lines = [f"{counted(len(report.drifted), 'frozen tensor')} changed:", table(report.drifted)]
    causes = sorted({difference.cause for difference in report.drifted if difference.cause})
    lines += [f"{code}: {CAUSES[code].explanation}; {CAUSES[code].remedy}" for code in causes]
    return "\n".join(lines)


def table(differences: Sequence[Difference]) -> str:
    """Tensor, verdict, elements, largest difference and cause, a tensor a line."""
    from io import StringIO

    from rich.console import Console
    from rich.table import Table

    drawn = Table(box=None, padding=(0, 2, 0, 0))
    for heading in ("tensor", "verdict", "elements", "largest", "cause"):
        drawn.add_column(heading, no_wrap=True, overflow="fold")
    for one in differences[:_ROWS]:
        elements, largest = "", ""
        if isinstance(one.detail, Detail):
            elements = f"{one.detail.elements_changed:,}"
            largest = "" if one.detail.max_abs_diff is None else f"{one.detail.max_abs_diff:.6g}"
        drawn.add_row(shown(one.name), one.verdict, elements, largest, one.cause or "unknown")
    text = StringIO()
    Console(file=text, width=200, highlight=False, markup=False, emoji=False, color_system=None).print(drawn)
    lines = [line.rstrip() for line in text.getvalue().splitlines()]
    if len(differences) > _ROWS:
        lines.append(f"... and {len(differences) - _ROWS:,} more")
    return "\n".join(lines)
