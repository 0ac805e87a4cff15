"""What a verify came to as Markdown, as a step summary shows it.

Names come from files that nobody vouches for. They stand in code spans, where Markdown and HTML mean nothing, and
without the two characters that would end a span or a cell of a table.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ..causes import CAUSES, UNSETTLED
from ..report import Report
from ..wording import counted, shown
from .outcomes import Outcome, headline, voucher

__all__ = ["not_verified", "render"]

_ROWS = 50
_NAMES = 5


def render(outcome: Outcome) -> str:
    """The summary: what was found in a line, counts, what vouches for it, what drifted and why."""
    report, manifest, failed = outcome.report, outcome.manifest, outcome.failed
    word = "ok" if report.ok else "FAILED"
    lines = [
        f"### Frozen weights: {word}",
        "",
        f"{_code(outcome.checkpoint)}: **{headline(report)}**",
        "",
        f"Against {_code(outcome.manifest_path)}, frozen root {_code(manifest.frozen_root)}: {_vouched(report)}.",
        "",
        *_counts(outcome),
    ]
    if failed:
        lines += ["", *_table(outcome)]
    said = [f"- {_explained(code)}" for code in outcome.causes]
    said += [f"- hint: {_code(hint, 1000)}" for hint in outcome.hints]
    if report.note:
        said.append(f"- note: {_code(report.note, 1000)}")
    said += [f"- {aside.words}: {_enumerated(aside.tensors)}" for aside in report.asides()]
    if accepted := [one.name for one in outcome.accepted]:
        said.append(f"- {counted(len(accepted))} in a wider dtype, which was accepted: {_enumerated(accepted)}")
    if said:
        lines += ["", *said]
    return "\n".join(lines) + "\n"


def not_verified(checkpoint: str, message: str) -> str:
    """The summary of a verify that came to nothing.

    Args:
        checkpoint: What was to be verified.
        message: Why it was not.
    """
    # Indented, it is code, and there is no fence that it could close.
    said = [f"    {shown(line, 1000)}" for line in message.split("\n")]
    return "\n".join(["### Frozen weights: not verified", "", f"{_code(checkpoint)}:", "", *said]) + "\n"


def _counts(outcome: Outcome) -> Sequence[str]:
    report = outcome.report
    missing = sum(one.verdict == "missing" for one in outcome.failed)
    always = [("frozen, with their bits", report.verified), ("frozen, drifted", len(outcome.failed) - missing)]
    others = [
        ("frozen, missing", missing),
        ("frozen, wider, accepted", len(outcome.accepted)),
        ("not in the manifest", len(report.extra)),
        ("trainable, missing", len(report.missing_trainable)),
        ("trainable, another shape or dtype", len(report.mismatched_trainable)),
        ("trainable, did not move", sum(len(one.tensors) for one in report.asides() if one.kind == "untrained")),
    ]
    counts = always + [one for one in others if one[1]]
    return ["| tensors | |", "| --- | ---: |", *(f"| {what} | {count:,} |" for what, count in counts)]


def _vouched(report: Report) -> str:
    return voucher(report) + ("; `--root` and `--attestation` do" if report.relied_on is None else "")


def _table(outcome: Outcome) -> list[str]:
    failed = outcome.failed
    details = [_code(detail) if (detail := one.describe_detail()) else "" for one in failed[:_ROWS]]
    headings = ["tensor", "verdict", "cause", *(["detail"] if any(details) else [])]
    lines = [f"| {' | '.join(headings)} |", f"| {' | '.join('---' for _ in headings)} |"]
    for one, detail in zip(failed, details, strict=False):
        cells = (_code(one.name), one.verdict, one.cause or UNSETTLED, detail)
        lines.append(f"| {' | '.join(cells[: len(headings)])} |")
    if len(failed) > _ROWS:
        lines += ["", f"and {len(failed) - _ROWS:,} more; `--json` lists all"]
    return lines


def _explained(code: str) -> str:
    cause = CAUSES[code]
    return f"`{code}`: {cause.explanation}; {cause.remedy}"


def _enumerated(names: Iterable[str]) -> str:
    listed = list(names)
    text = ", ".join(_code(name) for name in listed[:_NAMES])
    return text if len(listed) <= _NAMES else f"{text} and {len(listed) - _NAMES:,} more"


def _code(text: str, limit: int = 200) -> str:
    """A code span of foreign text."""
    safe = shown(text, limit).replace("`", r"\x60").replace("|", r"\x7c")
    return f"`{safe or ' '}`"  # a span may not be empty
