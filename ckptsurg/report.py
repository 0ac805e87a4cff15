"""The report: what verify and diff answer with."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

from pydantic import Field

from .documents import Document, Model, is_none
from .errors import FrozenWeightsChanged
from .wording import counted, enumerate_names, shown

__all__ = ["Detail", "DiffReport", "Difference", "Report", "Verdict"]

Verdict: TypeAlias = Literal[
    "changed", "dtype", "shape", "missing", "dtype_only", "sign_of_zero", "nan_payload", "added", "removed"
]


class Detail(Model):
    """Where a tensor differs from its baseline, and by how much.

    Attributes:
        elements_changed: How many elements have other bits.
        max_abs_diff: Largest difference of two values; None where it is not finite.
        first_index: The first such element, one number a dimension.
    """

    elements_changed: int
    max_abs_diff: float | None
    first_index: tuple[int, ...]


class Difference(Model):
    """One tensor that is not what it should be.

    Attributes:
        name: Its name in the manifest.
        verdict: In which way.
        cause: A cause code; None where nothing is known.
        detail: Expected and found, or, with a baseline, where and by how much.
    """

    name: str
    verdict: Verdict
    cause: str | None = None
    detail: Detail | dict[str, Any] | None = None

    def describe(self) -> str:
        """One line for people."""
        parts = (f"{shown(self.name)}: {_WORDS[self.verdict]}", self.describe_detail())
        cause = f"cause: {self.cause}" if self.cause else ""
        return "; ".join(part for part in (*parts, cause) if part)

    def describe_detail(self) -> str:
        """The detail in words; empty where there is none."""
        if isinstance(self.detail, Detail):
            parts = [counted(self.detail.elements_changed, "element")]
            if self.detail.max_abs_diff is not None:
                parts.append(f"by up to {self.detail.max_abs_diff:.6g}")
            if self.detail.first_index:
                parts.append(f"first at {list(self.detail.first_index)}")
            return ", ".join(parts)
        if self.detail and "expected" in self.detail:
            return f"expected {self.detail['expected']}, found {self.detail['found']}"
        return ""

    @property
    def hint(self) -> str | None:
        """The next step, where one is known."""
        return self.detail.get("hint") if isinstance(self.detail, dict) else None


_WORDS: dict[Verdict, str] = {
    "changed": "bits changed",
    "dtype": "has another dtype",
    "shape": "has another shape",
    "missing": "is missing",
    "dtype_only": "has the same values in a wider dtype",
    "sign_of_zero": "zeros changed their sign",
    "nan_payload": "NaNs changed their bits",
    "added": "is only in the second",
    "removed": "is only in the first",
}


class Report(Document):
    """Are the frozen tensors bit-identical?

    Attributes:
        ok: Whether they are, and what else was asked for (``exact``, ``expect_trained``) holds.
        verified: How many frozen tensors have their bits.
        drifted: Those that have not; also, accepted, those that only became wider.
        extra: Tensors that the manifest lacks.
        missing_trainable: Trainable tensors that are missing.
        untrained: Trainable tensors that did not move; None where that was not asked.
        note: What else there is to know of what was verified.
        relied_on: What vouches for the manifest: a ``pinned`` root, or a ``signed`` statement whose signature whoever
            gave it has checked; None where nothing does.
    """

    version: Literal[1] = Field(default=1, description="Version of this document's form.")
    ok: bool
    verified: int
    drifted: tuple[Difference, ...] = ()
    extra: tuple[str, ...] = ()
    missing_trainable: tuple[str, ...] = ()
    untrained: tuple[str, ...] | None = Field(default=None, exclude_if=is_none)
    note: str | None = Field(default=None, exclude_if=is_none)
    relied_on: Literal["pinned", "signed"] | None = Field(default=None, exclude_if=is_none)

    def __repr__(self) -> str:
        drifted = enumerate_names(difference.name for difference in self.drifted)
        return f"Report(ok={self.ok}, verified={self.verified}, drifted=[{drifted}])"

    def __str__(self) -> str:
        return f"{counted(self.verified, 'frozen tensor')} verified" if self.ok else self.summary()

    def raise_if_changed(self, when: str = "") -> None:
        """Raise FrozenWeightsChanged, naming every tensor, if the report is not ``ok``.

        Args:
            when: Said before the message: ``after step 7, ``.
        """
        if not self.ok:
            causes = {difference.name: difference.cause for difference in self.drifted if difference.cause}
            raise FrozenWeightsChanged(when + self.summary(), causes=causes)

    def describe_untrained(self) -> str:
        """What did not move, in one line."""
        names = self.untrained or ()
        return f"{counted(len(names), 'trainable tensor')} did not move: {enumerate_names(names)}"

    def summary(self, limit: int = 20) -> str:
        """What is wrong, a tensor a line."""
        if self.drifted:
            count = sum(difference.verdict != "dtype_only" for difference in self.drifted) or len(self.drifted)
            head = f"{counted(count, 'frozen tensor')} changed:"
            lines = [difference.describe() for difference in self.drifted]
            if self.untrained:
                lines.append(self.describe_untrained())
        elif self.untrained:
            head = f"{counted(len(self.untrained), 'trainable tensor')} did not move:"
            lines = [shown(name) for name in self.untrained]
        else:
            head = "not exactly the manifest's tensors:"
            lines = [f"{shown(name)}: is not in the manifest" for name in self.extra]
            lines += [f"{shown(name)}: trainable, and missing" for name in self.missing_trainable]
        if len(lines) > limit:
            lines[limit:] = [f"... and {len(lines) - limit:,} more"]
        lines += sorted({f"hint: {difference.hint}" for difference in self.drifted if difference.hint})
        return "\n  ".join([head, *lines])


class DiffReport(Document):
    """Two checkpoints, tensor by tensor.

    Attributes:
        ok: Whether they hold the same tensors with the same bits.
        tensors: Those in which they differ.
    """

    version: Literal[1] = Field(default=1, description="Version of this document's form.")
    ok: bool
    tensors: tuple[Difference, ...] = ()
