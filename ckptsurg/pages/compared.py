"""What a page says of a comparison: of a trained checkpoint with a manifest, or of two checkpoints."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from ..causes import CAUSES
from ..manifest import Manifest
from ..report import Difference, DiffReport, Report, Verdict
from ..tensors import TensorInfo
from ..wording import shown, size
from .entries import CHANGED, FATES, FOUND, Change, Entry, State
from .heat import grids, histogram
from .maps import draw
from .model import MOST_ROWS, CauseGroup, Fact, Page, Row, fate_of, names_of, of_all

__all__ = ["of_diff", "of_report"]

#: How many names of tensors are shown that moved for one reason.
_MOST_NAMES = 8

# --- verify --------------------------------------------------------------------------------------------

_STATES: dict[str, State] = {"missing": "missing", "shape": "other", "dtype": "other", "dtype_only": "wider"}


def of_report(
    report: Report,
    manifest: Manifest,
    changes: Mapping[str, Change],
    *,
    of: Sequence[tuple[str, str]],
    exact: bool = False,
) -> Page:
    """What was found of a trained checkpoint.

    Args:
        report: What was found.
        manifest: Of what.
        changes: By how much tensors changed, by the manifest's names; of tensors that are not named nothing is known.
        of: What was compared with what.
        exact: Whether tensors that the manifest lacks, and trainable ones that are missing, count.
    """
    differences = {difference.name: difference for difference in report.drifted}
    frozen = sum(record.frozen for record in manifest.tensors.values())
    accepts_wider = frozen - report.verified < len(differences)
    lacking, untrained = set(report.missing_trainable), set(report.untrained or ())
    unlike = {difference.name for difference in report.mismatched_trainable}
    entries = []
    for name, record in manifest.tensors.items():
        one, change = differences.get(name), changes.get(name)
        state: State
        if one is not None:
            state = _STATES.get(one.verdict, "changed")
        elif name in lacking:
            state = "absent"
        elif name in unlike:
            state = "unlike"
        elif record.trains and change is not None:
            state = "moved" if change.changed else "still"
        elif record.trains and name in untrained:
            state = "still"
        else:
            state = "same" if record.frozen else "unknown"
        has_failed = one is not None and not (accepts_wider and state == "wider")
        kind = CHANGED.get(state, CHANGED["other"]) if has_failed else fate_of(record)
        entries.append(Entry(name, record.info, kind, record.frozen, state, change, one))
    moved = [entry for entry in entries if entry.state == "moved"]
    trainable = [entry for entry in entries if not entry.frozen]
    failed = [one for one in report.drifted if not (accepts_wider and one.verdict == "dtype_only")]
    facts = [Fact("verified", "frozen, and bit-identical", f"{report.verified:,} of {frozen:,}")]
    if failed:
        failing = sum(entry.nbytes for entry in entries if entry.kind in CHANGED.values())
        facts += [
            Fact("drifted", "frozen, and not as published", f"{len(failed):,}"),
            Fact("drifted_size", "size of these", size(failing)),
        ]
    if changes or not trainable:
        facts.append(Fact("moved", "trainable tensors that moved", f"{len(moved):,} of {len(trainable):,}"))
    facts.append(Fact("relied_on", "what vouches for the manifest", _VOUCHERS[report.relied_on]))
    facts += [Fact("root", "root of the manifest", manifest.root)]
    lists = [names_of(one.words, one.tensors, is_failure=one.counts) for one in report.asides(exact=exact)]
    hints = [f"hint: {hint}" for hint in sorted({one.hint for one in failed if one.hint})]
    return Page(
        "verify",
        _verdict(report, frozen, failed),
        report.ok,
        of,
        facts,
        [*([report.note] if report.note else []), *hints],
        draw(entries, [*FATES.values(), *CHANGED.values()]),
        grids(entries),
        histogram(entries) if changes else (),
        _causes(failed, changes),
        _rows([entry for entry in entries if entry.difference is not None]),
        len(report.drifted),
        _rows(moved),
        len(moved),
        lists,
    )


_FROZEN = "frozen tensor"
_VOUCHERS = {"pinned": "its root is pinned", "signed": "a signed statement", None: "nothing pins it"}


def _verdict(report: Report, frozen: int, failed: Sequence[Difference]) -> str:
    missing = sum(one.verdict == "missing" for one in failed)
    if missing and missing == len(failed):
        return f"{of_all(missing, frozen, _FROZEN)} {_verb(missing, 'is', 'are')} missing"
    if failed:
        also = f", {missing:,} of them missing" if missing else ""
        return f"{of_all(len(failed), frozen, _FROZEN)} {_verb(len(failed), 'is not', 'are not')} as published{also}"
    intact = f"{of_all(report.verified, frozen, _FROZEN)} kept every bit"
    if report.ok:
        return intact
    return f"{intact}, but {', and '.join(one.words for one in report.shortcomings())}"


def _verb(count: int, one: str, several: str) -> str:
    return one if count == 1 else several


def _causes(failed: Iterable[Difference], changes: Mapping[str, Change]) -> list[CauseGroup]:
    groups: dict[str | None, list[str]] = defaultdict(list)
    for difference in failed:
        groups[difference.cause].append(difference.name)
    found = []
    for code, names in sorted(groups.items(), key=lambda item: (item[0] is None, -len(item[1]))):
        if code is not None and code in CAUSES:
            explanation, remedy = CAUSES[code].explanation, CAUSES[code].remedy
        else:
            explanation = "files alone do not settle why"
            remedy = (
                "put ckptsurg.watch(model, manifest=...) around the training, with Keras FreezeCallback: it sees more"
            )
            if not changes:
                remedy = "give the published checkpoint with --baseline: then the report sees how tensors moved"
        found.append(CauseGroup(code, explanation, remedy, len(names), [shown(name) for name in names[:_MOST_NAMES]]))
    return found


def _rows(entries: Sequence[Entry]) -> list[Row]:
    """The largest changes first; before them what was not measured, which is gone or another tensor."""

    def order(entry: Entry) -> tuple[bool, bool, float]:
        if entry.change is None:
            return (False, False, 0.0)
        relative = entry.change.relative
        return (True, relative == relative, -relative if relative == relative else 0.0)

    return [_row(entry) for entry in sorted(entries, key=order)[:MOST_ROWS]]


_WORDS: dict[Verdict, str] = {
    "changed": "other bits",
    "dtype": "another dtype",
    "shape": "another shape",
    "missing": "missing",
    "dtype_only": "the same values in a wider dtype",
    "sign_of_zero": "zeros changed their sign",
    "nan_payload": "NaNs changed their bits",
    "added": "only in the second",
    "removed": "only in the first",
}


def _row(entry: Entry) -> Row:
    one = entry.difference
    found = "moved" if one is None else _WORDS[one.verdict]
    if one is not None and isinstance(one.detail, dict) and (more := one.describe_detail()):
        found = f"{found}: {more}"
    info = "" if entry.info is None else str(entry.info)
    return Row(shown(entry.name), found, None if one is None else one.cause, info, entry.change)


# --- diff ----------------------------------------------------------------------------------------------


def of_diff(
    report: DiffReport,
    infos: tuple[Mapping[str, TensorInfo], Mapping[str, TensorInfo]],
    changes: Mapping[str, Change],
    *,
    of: Sequence[tuple[str, str]],
    notes: Sequence[str] = (),
) -> Page:
    """Two checkpoints, side by side.

    Args:
        report: Where they differ.
        infos: Dtype and shape of the tensors of each.
        changes: By how much tensors changed, by name.
        of: What was compared with what.
        notes: What else there is to know.
    """
    differences = {difference.name: difference for difference in report.tensors}
    entries = []
    for name, info in {**infos[1], **infos[0]}.items():
        one, change = differences.get(name), changes.get(name)
        kind, state = ("same", _SAME) if one is None else _COMPARED.get(one.verdict, ("changed", _MOVED))
        entries.append(Entry(name, info, FOUND[kind], False, state, change, one))
    differing = [entry for entry in entries if entry.difference is not None]
    facts = [
        Fact("identical", "identical tensors", f"{len(entries) - len(differing):,} of {len(entries):,}"),
        *(
            Fact(word, kind.word, f"{count:,}")
            for word, kind in FOUND.items()
            if word != "same" and (count := sum(entry.kind is kind for entry in entries))
        ),
    ]
    both = f"{of_all(len(differing), len(entries))} {_verb(len(differing), 'differs', 'differ')}"
    return Page(
        "diff",
        "The two checkpoints are identical" if report.ok else both,
        report.ok,
        of,
        facts,
        notes,
        draw(entries, list(FOUND.values())),
        [] if report.ok else grids(entries),
        histogram(entries) if changes else (),
        _causes([one for one in report.tensors if one.cause], changes),
        _rows(differing),
        len(differing),
    )


_SAME: State = "same"
_MOVED: State = "moved"
_COMPARED: dict[str, tuple[str, State]] = {
    "dtype": ("other", "other"),
    "shape": ("other", "other"),
    "dtype_only": ("other", "wider"),
    "added": ("added", "added"),
    "removed": ("removed", "removed"),
}
