"""What a verify came to: the report, of what it is, and what of it counts."""

from __future__ import annotations

from dataclasses import dataclass

from ..manifest import Manifest
from ..report import Difference, Report
from ..wording import counted

__all__ = ["Outcome", "headline", "voucher"]

_VOUCHERS = {
    "pinned": "the manifest is pinned",
    "signed": "the manifest is that of the statement",
    None: "nothing pins the manifest",
}


@dataclass(frozen=True, slots=True)
class Outcome:
    """A report, and what was asked for.

    Attributes:
        report: What was found.
        manifest: What had to hold.
        checkpoint: What was verified, as the user called it.
        manifest_path: Where the manifest is, as the user called it.
        exact: Whether tensors that the manifest lacks, and trainable ones that are missing, count.
        allow_widened: Whether the same values in a wider dtype are accepted.
    """

    report: Report
    manifest: Manifest
    checkpoint: str
    manifest_path: str
    exact: bool = False
    allow_widened: bool = False

    @property
    def failed(self) -> list[Difference]:
        """The frozen tensors that are not what they should be."""
        return [one for one in self.report.drifted if not self._is_accepted(one)]

    @property
    def accepted(self) -> list[Difference]:
        """Those that only became wider, where that is accepted."""
        return [one for one in self.report.drifted if self._is_accepted(one)]

    @property
    def causes(self) -> list[str]:
        """The cause codes of what failed, each once."""
        return sorted({one.cause for one in self.failed if one.cause})

    @property
    def hints(self) -> list[str]:
        """The next steps, each once."""
        return sorted({one.hint for one in self.failed if one.hint})

    def _is_accepted(self, one: Difference) -> bool:
        return self.allow_widened and one.verdict == "dtype_only"


def voucher(report: Report) -> str:
    """What vouches for the manifest."""
    return _VOUCHERS[report.relied_on]


def headline(report: Report) -> str:
    """What was found, in one line without names."""
    verified = counted(report.verified, "frozen tensor")
    missing = sum(difference.verdict == "missing" for difference in report.drifted)
    drifted = sum(difference.verdict != "missing" for difference in report.drifted)
    if report.ok and report.drifted:
        return f"{verified} verified, {drifted:,} in a wider dtype"
    if report.ok:
        return f"{verified} verified: every one has its bits"
    if not report.drifted and report.untrained:
        return f"{verified} verified, but {counted(len(report.untrained), 'trainable tensor')} did not move"
    if not report.drifted:
        return f"{verified} verified, but there are others than the manifest's"
    if not report.verified and not drifted:
        if any(difference.cause == "not_saved" for difference in report.drifted):
            return f"none of the manifest's {counted(missing, 'frozen tensor')} is there: what trains was saved alone"
        return f"none of the manifest's {counted(missing, 'frozen tensor')} is there: is it this model's manifest?"
    counts = ((drifted, "drifted"), (missing, "missing"))
    parts = [f"{counted(count, 'frozen tensor')} {what}" for count, what in counts if count]
    return f"{', '.join(parts)}, {report.verified:,} verified"
