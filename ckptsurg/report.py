"""The report: what verify and diff answer with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

from pydantic import Field

from .documents import Document, Model, is_empty, is_none
from .errors import FrozenWeightsChanged
from .wording import counted, enumerate_names, on_ranks, shown

__all__ = ["Aside", "Detail", "DiffReport", "Difference", "Report", "Verdict"]

Verdict: TypeAlias = Literal[
    "changed", "dtype", "shape", "missing", "dtype_only", "sign_of_zero", "nan_payload", "added", "removed"
]


class Detail(Model):
    """Where a tensor differs from its baseline, and by how much.

    Attributes:
        elements_changed: How many elements have other bits.
        max_abs_diff: Largest difference of two values; None where it is not finite.
        first_index: The first such element, one number a dimension.
        ranks: As ``Difference.ranks``.
    """

    elements_changed: int
    max_abs_diff: float | None
    first_index: tuple[int, ...]
    ranks: tuple[int, ...] = Field(default=(), exclude_if=is_empty)


class Difference(Model):
    """One tensor that is not what it should be.

    Attributes:
        name: Its name in the manifest.
        verdict: In which way.
        cause: A cause code; None where nothing is known.
        detail: Expected and found (of two checkpoints, first and second), or, with a baseline, where and by how much;
            of a model that several processes hold, also the ``ranks`` whose part of it moved.
    """

    name: str
    verdict: Verdict
    cause: str | None = None
    detail: Detail | dict[str, Any] | None = None

    def describe(self) -> str:
        """One line for people."""
        parts = (f"{self.label}: {_WORDS[self.verdict]}", self.describe_detail())
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
        if self.detail and "first" in self.detail:
            return f"first {self.detail['first']}, second {self.detail['second']}"
        return ""

    @property
    def ranks(self) -> tuple[int, ...]:
        """The ranks whose part of it moved, where several processes hold the model; empty where that is not known."""
        if isinstance(self.detail, Detail):
            return self.detail.ranks
        return tuple(self.detail.get("ranks", ())) if self.detail else ()

    @property
    def label(self) -> str:
        """Its name, made safe to print, and the ranks."""
        return on_ranks(self.name, self.ranks)

    def on(self, ranks: Sequence[int]) -> Difference:
        """The same with these ranks in its detail."""
        if isinstance(self.detail, Detail):
            detail: Detail | dict[str, Any] = self.detail.model_copy(update={"ranks": tuple(ranks)})
        else:
            detail = {**(self.detail or {}), "ranks": list(ranks)}
        return self.model_copy(update={"detail": detail})

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


class Aside(NamedTuple):
    """What there is to say of tensors that are not frozen.

    Attributes:
        kind: The field of the report.
        words: How many, and what of them: ``2 trainable tensors did not move``.
        tensors: Each of them, by its name and what else there is to say; not yet safe to print.
        counts: Whether it was asked for, and so fails the report.
    """

    kind: Literal["untrained", "mismatched_trainable", "missing_trainable", "extra"]
    words: str
    tensors: Sequence[str]
    counts: bool

    def __str__(self) -> str:
        return f"{self.words}: {enumerate_names(self.tensors)}"


class Report(Document):
    """Are the frozen tensors bit-identical?

    Attributes:
        ok: Whether they are, and what else was asked for (``exact``, ``expect_trained``) holds.
        verified: How many frozen tensors have their bits.
        drifted: Those that have not; also, accepted, those that only became wider.
        extra: Tensors that the manifest lacks.
        missing_trainable: Trainable tensors that are missing.
        mismatched_trainable: Trainable tensors in another shape, or in a dtype that does not hold every value of the
            published one: they are not what this training began with, or nothing tells. Like ``extra`` they count
            with ``exact``, and with ``expect_trained`` too.
        untrained: Trainable tensors that did not move, or should have and are missing; None where that was not asked.
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
    mismatched_trainable: tuple[Difference, ...] = Field(default=(), exclude_if=is_empty)
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
            ranks = {difference.name: difference.ranks for difference in self.drifted if difference.ranks}
            raise FrozenWeightsChanged(when + self.summary(), causes=causes, ranks=ranks)

    def asides(self, *, exact: bool = False) -> list[Aside]:
        """What there is to say of tensors that are not frozen.

        Args:
            exact: Whether ``exact`` was asked.
        """
        missing, untrained = set(self.missing_trainable), self.untrained or ()
        still = [name for name in untrained if name not in missing]
        others = [f"{one.name} ({one.describe_detail()})" for one in self.mismatched_trainable]
        ways = " or ".join(sorted({one.verdict for one in self.mismatched_trainable}, reverse=True))
        asides = (
            Aside("untrained", "trainable tensor did not move", still, True),
            Aside(
                "mismatched_trainable",
                f"trainable tensor has another {ways} than the manifest's",
                others,
                exact or self.untrained is not None,
            ),
            Aside(
                "missing_trainable",
                "trainable tensor is missing",
                self.missing_trainable,
                exact or len(still) < len(untrained),
            ),
            Aside("extra", "tensor is not in the manifest", self.extra, exact),
        )
        return [aside._replace(words=_in_number(len(aside.tensors), aside.words)) for aside in asides if aside.tensors]

    def shortcomings(self) -> list[Aside]:
        """What fails the report, besides frozen tensors."""
        if self.ok:
            return []
        counting = [aside for aside in self.asides() if aside.counts]
        return counting if counting or self.drifted else self.asides(exact=True)

    def summary(self, limit: int = 20) -> str:
        """What is wrong, a tensor a line."""
        asides = self.shortcomings()
        if self.drifted:
            count = sum(difference.verdict != "dtype_only" for difference in self.drifted) or len(self.drifted)
            head = f"{counted(count, 'frozen tensor')} changed:"
            lines = [*(difference.describe() for difference in self.drifted), *map(str, asides)]
        elif len(asides) == 1:
            head = f"{asides[0].words}:"
            lines = [shown(tensor) for tensor in asides[0].tensors]
        else:
            head = "the other tensors are not what was asked for:"
            lines = [str(aside) for aside in asides]
        if len(lines) > limit:
            lines[limit:] = [f"... and {len(lines) - limit:,} more"]
        lines += sorted({f"hint: {difference.hint}" for difference in self.drifted if difference.hint})
        return "\n  ".join([head, *lines])


def _in_number(count: int, words: str) -> str:
    """``2 tensors are missing``, of ``tensor is missing``."""
    if count != 1:
        words = words.replace("tensor ", "tensors ").replace(" is ", " are ").replace(" has ", " have ")
    return f"{count:,} {words}"


class DiffReport(Document):
    """Two checkpoints, tensor by tensor.

    Attributes:
        ok: Whether they hold the same tensors with the same bits.
        tensors: Those in which they differ.
    """

    version: Literal[1] = Field(default=1, description="Version of this document's form.")
    ok: bool
    tensors: tuple[Difference, ...] = ()
