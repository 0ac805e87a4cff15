"""Manifest x tensors -> report: what is there, in which way it is not what it should be, why, and what else is odd.

What looks into differences needs numpy, and is imported once there is one.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

from .baselines import Baseline
from .counterparts import Counterparts, mismatched
from .errors import UsageError
from .manifest import Manifest, TensorRecord
from .metering import Meter, Progress
from .ranks import ALONE, Ranks
from .renaming import Renaming, common_prefix, renamed
from .report import Difference, Report
from .tensors import FLOATS, TensorSource
from .wording import shown

__all__ = ["check_root", "verify"]

_DIGEST = re.compile("(blake3|sha256):[0-9a-f]{64}")


def check_root(manifest: Manifest, digest: str) -> None:
    """Raise UsageError unless the manifest has this root or frozen root."""
    if not _DIGEST.fullmatch(digest):
        found = f'"{shown(digest)}"' if digest else "nothing"
        hint = "`rewrite` prints it, and the manifest holds it"
        raise UsageError(f"the root: expected blake3: or sha256: with 64 digits from 0 to f, found {found}", hint=hint)
    if digest not in (manifest.root, manifest.frozen_root):
        raise UsageError(
            f"the pinned root is {shown(digest)}, "
            f"the manifest has root {manifest.root} and frozen_root {manifest.frozen_root}",
            hint="this is not the manifest that was pinned",
        )


def verify(
    manifest: Manifest,
    source: TensorSource,
    *,
    baseline: TensorSource | None = None,
    names: Renaming | None = None,
    prefix: str | None = None,
    exact: bool = False,
    allow_widened: bool = False,
    expect_trained: bool = False,
    witnessed: Mapping[str, str] | None = None,
    saved: bool = True,
    also_given: Collection[str] = (),
    note: str | None = None,
    only: Sequence[str] | None = None,
    jobs: int = 1,
    progress: Progress | None = None,
    ranks: Ranks = ALONE,
) -> Report:
    """Prove that every frozen tensor has the bits that the manifest records.

    Args:
        manifest: What must hold.
        source: What came back from training.
        baseline: The tensors that the manifest describes; with them the report says where tensors differ. What lies in
            files on both sides is compared with it byte by byte, and only where it differs are digests computed.
        names: From names of ``source`` to names of the manifest.
        prefix: Taken off the names of ``source``.
        exact: Whether tensors that the manifest lacks count, and trainable ones that are missing or in another shape
            or dtype.
        allow_widened: Whether a tensor in a wider dtype with the same values is accepted.
        expect_trained: Whether trainable tensors that did not move, are missing, or in another shape or dtype, count.
        witnessed: Causes that were seen while the model trained, by name; None where nobody watched.
        saved: Whether ``source`` was saved, so that what it lacks was left out; a live model is not.
        also_given: Further names of the other side, that stand for none of the manifest's.
        note: What there is to know of ``source``; the report says it, and what else it has to say of the proof.
        only: Patterns that select the tensors that are looked at; None for all, and for what the manifest lacks.
        jobs: How many threads read what lies in files as it is.
        progress: Told how many bytes this rank reads.
        ranks: Among which what is read is dealt out; each has the same manifest and tensors.

    Raises:
        ManifestError: if nothing is frozen.
        SpecError: if a pattern cannot be read or selects nothing.
        UsageError: if names do not fit, nothing of ``only`` is frozen, or the baseline is not what the manifest
            describes.
    """
    manifest.require_frozen()
    trained = Counterparts(manifest, source, renamed(source.tensors, names, prefix))
    records = manifest.tensors if only is None else _asked_for(manifest, trained, only, source.metadata)
    frozen = {name: record for name, record in records.items() if record.frozen}
    trainable = _due_to_move(records) if expect_trained else {}
    before = None if baseline is None else Baseline(manifest, frozen, baseline)
    read = [*frozen.items(), *trainable.items()]
    meter = Meter(sum(record.info.nbytes for name, record in read if name in trained.tensors), ranks.watched(progress))

    equal = () if before is None else before.equal(trained, meter, jobs, ranks)
    unproven = {name: record for name, record in frozen.items() if name not in equal}
    known = trained.digests(unproven, meter, jobs, ranks)
    moved = trained.digests(trainable, meter, jobs, ranks)

    def judge() -> Report:
        drifted = trained.differences(unproven, known)
        drifted = _without_absent_twins(manifest, drifted)
        drifted, traits = (drifted, {}) if before is None else before.locate(drifted, trained)
        if drifted:
            from .gathering import gather
            from .settling import with_causes

            given = (*source.tensors, *also_given)
            evidence = gather(manifest, frozen, trained, drifted, traits, given=given, saved=saved, witnessed=witnessed)
            drifted = with_causes(drifted, evidence)
        if frozen.keys().isdisjoint(trained.tensors):
            drifted = _with_prefix_hint(manifest, drifted, source.tensors)

        failed = [one for one in drifted if not (allow_widened and one.verdict == "dtype_only")]
        extra = trained.others() if only is None else ()
        lacking = tuple(name for name, record in records.items() if not record.frozen and name not in trained.tensors)
        told = {one.name for one in drifted if one.verdict in ("missing", "shape", "dtype")}
        others = tuple(one for one in mismatched(records, trained.tensors) if one.name not in told)
        untrained = tuple(_untrained(trainable, trained, told, moved)) if expect_trained else None
        asked = None if only is None else f"only {', '.join(map(shown, only))} was asked for"
        compared = None if before is None else before.note(len(equal))
        return Report(
            ok=not (failed or untrained or (exact and (extra or lacking)) or ((exact or expect_trained) and others)),
            verified=len(frozen) - len(failed),
            drifted=tuple(drifted),
            extra=extra,
            missing_trainable=lacking,
            mismatched_trainable=others,
            untrained=untrained,
            note="; ".join(filter(None, (note, asked, compared))) or None,
        )

    return ranks.broadcast(judge)


# --- What is looked at -------------------------------------------------------------------------------


def _asked_for(
    manifest: Manifest, trained: Counterparts, patterns: Sequence[str], metadata: Mapping[str, str] | None
) -> Mapping[str, TensorRecord]:
    """The records that patterns select; of a tensor that is not there also its twins', which may stand for it."""
    from .selectors import selected_names

    names = set(selected_names(manifest.infos, patterns, metadata))
    absent = names - trained.tensors.keys()
    names.update(*(group for group in manifest.tied if not absent.isdisjoint(group)))
    records = {name: record for name, record in manifest.tensors.items() if name in names}
    if not any(record.frozen for record in records.values()):
        hint = "`ckptsurg inspect` shows what a pattern selects"
        raise UsageError("nothing that was asked for is frozen: there is nothing to prove", hint=hint)
    return records


def _due_to_move(records: Mapping[str, TensorRecord]) -> dict[str, TensorRecord]:
    """Those of tensors that an optimizer trains, as a whole even where only rows are frozen."""
    return {
        name: record.model_copy(update={"rows": None})
        for name, record in records.items()
        if record.trains and record.dtype in FLOATS and record.info.elements
    }


# --- Frozen, and not what it should be ---------------------------------------------------------------


def _without_absent_twins(manifest: Manifest, drifted: list[Difference]) -> list[Difference]:
    """Of tied tensors one may be missing, if its twin is there unchanged: savers write a shared tensor once."""
    bad = {difference.name for difference in drifted}
    excused = {name for group in manifest.tied if not bad.issuperset(group) for name in group}
    return [difference for difference in drifted if difference.verdict != "missing" or difference.name not in excused]


def _with_prefix_hint(manifest: Manifest, drifted: list[Difference], given: Iterable[str]) -> list[Difference]:
    """Where all are missing but stand under one prefix, say so; of tied tensors one is enough."""
    missing = {difference.name for difference in drifted}
    groups = [missing.intersection(group) for group in manifest.tied]
    tied = {name for group in groups for name in group}
    wanted = [group for group in groups if group] + [{name} for name in missing if name not in tied]
    prefix = common_prefix(wanted, given)
    if prefix is None:
        return drifted
    hint = {"hint": f"all of them stand under one prefix; verify with --prefix {shown(prefix)} (in Python prefix=)"}
    return [Difference(name=difference.name, verdict="missing", detail=hint) for difference in drifted]


# --- Trainable, and what it was ----------------------------------------------------------------------


def _untrained(
    trainable: Mapping[str, TensorRecord],
    trained: Counterparts,
    told: Collection[str],
    known: Mapping[str, str | None],
) -> Iterator[str]:
    """Tensors that are what they were, if in a wider dtype, or are not there; but for those of which that is told."""
    differences = trained.differences(trainable, known)
    other = {one.name for one in differences if one.verdict not in ("missing", "dtype_only")}
    digests = {trainable[name].digest for name in other}
    for name, record in trainable.items():
        # Of tied tensors a saver writes one.
        if name not in other and name not in told and (name in trained.tensors or record.digest not in digests):
            yield name
