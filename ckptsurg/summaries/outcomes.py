"""What a verify came to: the report, of what it is, and what of it counts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..causes import CAUSES
from ..manifest import Manifest
from ..report import Difference, Report
from ..wording import counted

__all__ = ["Outcome", "headline", "next_steps", "voucher"]

#: Of frozen tensors that drifted without a cause: from here on it is not this or that tensor.
_NEARLY_ALL, _SEVERAL = 0.9, 3
_HOLD = (
    "train with ckptsurg.freeze and its guard (in Trainer, Lightning and Keras the FreezeCallback), which stop the "
    "first wrong step; ckptsurg.watch only finds the cause"
)
_CAST = f"values in another dtype went through a cast: {CAUSES['dtype_only'].remedy}"
_LOAD = "train from the published output, not from its base or another head"

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
        return next_steps(self.report, self.failed)

    def _is_accepted(self, one: Difference) -> bool:
        return self.allow_widened and one.verdict == "dtype_only"


def voucher(report: Report) -> str:
    """What vouches for the manifest."""
    return _VOUCHERS[report.relied_on]


def headline(report: Report) -> str:
    """What was found, in one line without names; what failed comes first."""
    verified = f"{counted(report.verified, 'frozen tensor')} verified"
    missing = sum(one.verdict == "missing" for one in report.drifted)
    drifted = len(report.drifted) - missing
    if report.ok:
        found = f"{drifted:,} in a wider dtype" if drifted else "every one has its bits"
        moved = "; what trains has moved" if report.untrained is not None else ""
        return f"{verified}{', ' if drifted else ': '}{found}{moved}"
    if not report.drifted:
        return f"{', '.join(aside.words for aside in report.shortcomings())}; {verified}"
    if not report.verified and not drifted:
        if any(one.cause == "not_saved" for one in report.drifted):
            return f"none of the manifest's {counted(missing, 'frozen tensor')} is there: what trains was saved alone"
        return f"none of the manifest's {counted(missing, 'frozen tensor')} is there: is it this model's manifest?"
    unsettled = sum(one.verdict == "changed" and one.cause is None for one in report.drifted)
    total = report.verified + len(report.drifted)
    if unsettled >= _SEVERAL and unsettled >= _NEARLY_ALL * total:
        share = f"all {total:,}" if drifted == total else f"{drifted:,} of {total:,}"
        return f"{share} frozen tensors drifted: was anything frozen? was this trained from this output?"
    counts = ((drifted, "drifted"), (missing, "missing"))
    parts = [f"{counted(count, 'frozen tensor')} {what}" for count, what in counts if count]
    return f"{', '.join(parts)}, {report.verified:,} verified"


def next_steps(report: Report, failed: Sequence[Difference]) -> list[str]:
    """What to do next, a line each.

    Args:
        report: What was found.
        failed: The frozen tensors that are not what they should be.
    """
    steps = sorted({one.hint for one in failed if one.hint})
    unsettled = {one.verdict for one in failed if one.cause is None}
    others = {one.verdict for one in report.mismatched_trainable}
    if any(one.verdict == "changed" and one.detail is None for one in failed):
        steps.append("--baseline CKPT, the published output, shows where tensors differ and by how much")
    if "dtype" in unsettled | others:
        steps.append(_CAST)
    if "changed" in unsettled:
        steps.append(_HOLD)
    if "shape" in others:
        steps.append(f"{_LOAD}; with --expect-trained this fails" if report.ok else _LOAD)
    if report.untrained:
        steps.append("build the optimizer of frozen.trainable_parameters(), and verify what it trained")
    return steps
