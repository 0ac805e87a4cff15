"""Assertions for tests: weights that must not move, and weights that must be the same."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from . import proofs, training
from .causes import UNSETTLED, explained
from .coercing import ManifestLike, TensorsLike, is_model
from .errors import CkptsurgError, FrozenWeightsChanged, UsageError
from .renaming import Renaming
from .report import Detail, Difference, Report
from .wording import counted, shown

if TYPE_CHECKING:
    import torch

__all__ = ["assert_bit_identical", "frozen_weights"]

_ROWS = 20


def assert_bit_identical(a: TensorsLike, b: TensorsLike) -> None:
    """Assert that two checkpoints, models or state dicts hold the same tensors with the same bits.

    Args:
        a: What is expected: a path, a model or a state dict.
        b: What is there.

    Raises:
        AssertionError: with a table of what differs, where and by how much.
        UsageError: if there is nothing at a path, or both sides are the same memory.
        CheckpointError: if a checkpoint is malformed.
        SystemFailure: if one cannot be read.
    """
    __tracebackhide__ = True
    with _ending_here():
        _refuse_same_memory(a, b)
        report = proofs.diff(a, b)
    if not report.ok:
        raise AssertionError(f"{counted(len(report.tensors))} not bit-identical:\n{_table(report.tensors)}")


def _refuse_same_memory(a: TensorsLike, b: TensorsLike) -> None:
    """A state dict is a view of its model: it changes with it, so that comparing the two shows nothing."""
    one, other = _addresses(a), _addresses(b)
    both = [name for name, address in one.items() if address and other.get(name)]
    if both and all(one[name] == other[name] for name in both):
        raise UsageError(
            f"both sides are the same memory, such as {shown(both[0])}",
            hint="keep a copy before training: {name: tensor.clone() for name, tensor in model.state_dict().items()}",
        )


def _addresses(given: Any) -> dict[str, int]:
    state = given.state_dict() if is_model(given) else given
    if not isinstance(state, Mapping):
        return {}
    return {name: tensor.data_ptr() for name, tensor in state.items() if hasattr(tensor, "data_ptr")}


class frozen_weights:  # noqa: N801 - it reads as a function, and is used as one
    """Assert that what happens in the ``with`` leaves frozen weights as they are; the model is only watched.

    ``with frozen_weights(model, freeze=["**", "!fc"]): train_one_step(model)``

    Args:
        model: The model.
        freeze: Patterns of what must not move, over the model's own names.
        manifest: Instead of patterns, a manifest or its path.
        names: From the model's names to the manifest's, where they differ.
        expect_trained: Whether each trainable tensor has to move.

    Raises:
        FrozenWeightsChanged: with a table of what moved, where, by how much, and why.
        CkptsurgError: if patterns, manifest and model do not fit.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        freeze: str | Iterable[str | Mapping[str, Any]] | None = None,
        *,
        manifest: ManifestLike | None = None,
        names: Renaming | None = None,
        expect_trained: bool = False,
    ) -> None:
        __tracebackhide__ = True
        self.entered = False
        with _ending_here():
            self._watch = training.watch(model, freeze, manifest=manifest, names=names, expect_trained=expect_trained)

    @property
    def report(self) -> Report | None:
        """What became of the frozen tensors; None before the end."""
        return self._watch.report

    def __enter__(self) -> Self:
        __tracebackhide__ = True
        self.entered = True
        with _ending_here():
            self._watch.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        __tracebackhide__ = True
        try:
            self._watch.__exit__(kind, error, trace)
        except FrozenWeightsChanged as changed:
            told = _told(self._watch.report)
            raise FrozenWeightsChanged(told, causes=changed.causes, ranks=changed.ranks) from None


class _ending_here:  # noqa: N801 - it reads as a function, and is used as one
    """Errors come without the way that they took through this package: the test's own line says more."""

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        __tracebackhide__ = True
        if isinstance(error, CkptsurgError):
            raise error.with_traceback(None) from None


def _told(report: Report | None) -> str:
    assert report is not None
    if not report.drifted:
        return report.summary()
    causes = sorted({difference.cause for difference in report.drifted if difference.cause})
    head = f"{counted(len(report.drifted), 'frozen tensor')} changed:"
    lines = [head, _table(report.drifted), *map(explained, causes)]
    return "\n".join([*lines, *map(str, report.shortcomings())])


def _table(differences: Sequence[Difference]) -> str:
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
        drawn.add_row(one.label, one.verdict, elements, largest, one.cause or UNSETTLED)
    text = StringIO()
    Console(file=text, width=200, highlight=False, markup=False, emoji=False, color_system=None).print(drawn)
    lines = [line.rstrip() for line in text.getvalue().splitlines()]
    if len(differences) > _ROWS:
        lines.append(f"... and {len(differences) - _ROWS:,} more")
    return "\n".join(lines)
