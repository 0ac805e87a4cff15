"""Manifest x tensors -> report. What lies in files is hashed or compared in threads, all else as it is read.

What looks into differences needs numpy, and is imported once there is one.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from .baselines import Baseline
from .checkpoints import Extent, extents_of
from .errors import UsageError
from .manifest import Manifest, TensorRecord
from .metering import Meter, Progress
from .reading import digests
from .renaming import Renaming, align, common_prefix, renamed, unwrapped
from .report import Difference, Report
from .tensors import DTYPE_BITS, FLOATS, Buffer, TensorInfo, TensorSource, algorithm_of, digest_of
from .wording import shown

if TYPE_CHECKING:
    from .traits import Traits

__all__ = ["check_root", "verify"]


def check_root(manifest: Manifest, digest: str) -> None:
    """Raise UsageError unless the manifest has this root or frozen root."""
    if digest not in (manifest.root, manifest.frozen_root):
        raise UsageError(
            f"the pinned root is {shown(digest)}, "
            f"the manifest has root {manifest.root} and frozen_root {manifest.frozen_root}",
            hint="this is not the manifest that was pinned",
        )


def verify(
    manifest: Manifest,
    trained: TensorSource,
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
    only: Collection[str] | None = None,
    jobs: int = 1,
    progress: Progress | None = None,
) -> Report:
    """Prove that every frozen tensor has the bits that the manifest records.

    Args:
        manifest: What must hold.
        trained: What came back from training.
        baseline: The tensors that the manifest describes; with them the report says where tensors differ. What lies in
            files on both sides is compared with it byte by byte, and only where it differs are digests computed.
        names: From names of ``trained`` to names of the manifest.
        prefix: Taken off the names of ``trained``.
        exact: Whether tensors that the manifest lacks, and trainable ones that are missing, count.
        allow_widened: Whether a tensor in a wider dtype with the same values is accepted.
        expect_trained: Whether trainable tensors that did not move, or are missing, count.
        witnessed: Causes that were seen while the model trained, by name; None where nobody watched.
        saved: Whether ``trained`` was saved, so that what it lacks was left out; a live model is not.
        also_given: Further names of the other side, that stand for none of the manifest's.
        note: What the report says besides.
        only: Names of the tensors that are looked at; None for all, and for what the manifest lacks.
        jobs: How many threads read what lies in files as it is.
        progress: Told how many bytes are read.

    Raises:
        ManifestError: if nothing is frozen.
        UsageError: if names do not fit, nothing of ``only`` is frozen, or the baseline is not what the manifest
            describes.
    """
    manifest.require_frozen()
    given = trained.tensors
    partners = align(manifest.tensors, renamed(given, names, prefix))
    records = manifest.tensors if only is None else _asked_for(manifest, only, partners)
    frozen = {name: record for name, record in records.items() if record.frozen}
    before = None if baseline is None else Baseline(manifest, frozen, baseline)
    trainable = {name: record for name, record in records.items() if record.trains} if expect_trained else {}
    read = [record.info.nbytes for some in (frozen, trainable) for name, record in some.items() if name in partners]
    meter = Meter(sum(read), progress)
    held = _lying(frozen, trained, partners)
    known: dict[str, str] = {}
    if before is not None:
        known = {name: frozen[name].held_digest for name in before.equal(held, trained, meter, jobs)}
        note = _joined(note, before.note(len(known)))
    rest = {name: (extent, algorithm_of(frozen[name].digest)) for name, extent in held.items() if name not in known}
    known |= digests(rest, trained.label, meter, jobs)
    drifted: list[Difference] = []
    traits: dict[str, Traits] = {}
    for name, record in frozen.items():
        partner = partners.get(name)
        if partner is None:
            drifted.append(Difference(name=name, verdict="missing"))
            continue
        difference = _check(name, record, trained, partner, known.get(name), meter)
        if difference is not None and before is not None:
            difference, how = before.locate(difference, record, trained, partner)
            if how is not None:
                traits[name] = how
        if difference is not None:
            drifted.append(difference)
    drifted = _without_absent_twins(manifest, drifted)
    if drifted:
        from .settling import Evidence, with_causes

        bad = {difference.name for difference in drifted}
        vectors = [name for name, r in frozen.items() if len(r.shape) == 1 and r.dtype in FLOATS and name not in bad]
        evidence = Evidence(
            names=manifest.tensors.keys(),
            given={unwrapped(name) for name in (*given, *also_given)},
            ranks={name: len(record.shape) for name, record in frozen.items() if record.dtype in FLOATS},
            saved=saved,
            witnessed=witnessed,
            traits=traits,
            twins=_moving_twins(manifest, drifted, trained, partners),
            recognised=bool(partners),
            uniform={name for name in vectors if traits and _is_uniform(trained, partners[name])},
            standing=_standing_counters(frozen, bad),
        )
        drifted = with_causes(drifted, evidence)
    if not any(name in partners for name in frozen):
        drifted = _with_prefix_hint(manifest, drifted, given)
    taken = set(partners.values())
    extra = tuple(name for name in given if name not in taken) if only is None else ()
    lacking = tuple(name for name, record in records.items() if not record.frozen and name not in partners)
    untrained = tuple(_untrained(trainable, trained, partners, meter, jobs)) if expect_trained else None
    accepted = {"dtype_only"} if allow_widened else set()
    ok = all(difference.verdict in accepted for difference in drifted) and not (exact and (extra or lacking))
    ok = ok and not untrained
    verified = len(frozen) - sum(difference.verdict not in accepted for difference in drifted)
    return Report(
        ok=ok,
        verified=verified,
        drifted=tuple(drifted),
        extra=extra,
        missing_trainable=lacking,
        untrained=untrained,
        note=note,
    )


def _is_uniform(source: TensorSource, name: str) -> bool:
    """Whether all elements of a tensor have the same bits."""
    raw = b"".join(bytes(chunk) for chunk in source.read(name))
    element = DTYPE_BITS[source.tensors[name].dtype] // 8
    return raw == raw[:element] * (len(raw) // element)


def _standing_counters(frozen: Mapping[str, TensorRecord], bad: Collection[str]) -> set[str]:
    """Counters of batches that are not zero, and are what they were. Those of InstanceNorm are always zero."""
    return {
        name
        for name, record in frozen.items()
        if name.endswith("num_batches_tracked")
        and name not in bad
        and record.digest != digest_of([bytes(record.info.nbytes)], algorithm_of(record.digest))
    }


def _asked_for(manifest: Manifest, only: Collection[str], partners: Mapping[str, str]) -> Mapping[str, TensorRecord]:
    """The records of these tensors; of one that is not there also of its twins, which may stand for it."""
    names = set(only)
    names.update(*(group for group in manifest.tied if any(name in names and name not in partners for name in group)))
    records = {name: record for name, record in manifest.tensors.items() if name in names}
    if not any(record.frozen for record in records.values()):
        hint = "`ckptsurg inspect` shows what a pattern selects"
        raise UsageError("nothing that was asked for is frozen: there is nothing to prove", hint=hint)
    return records


def _lying(records: Mapping[str, TensorRecord], source: TensorSource, partners: Mapping[str, str]) -> dict[str, Extent]:
    """Where in files the frozen parts of tensors lie as they are, by the manifest's names."""
    extents = extents_of(source)
    found = {}
    for name, record in records.items():
        partner = partners.get(name, "")
        if partner not in extents or source.tensors[partner].dtype != record.dtype:
            continue
        if _has_room(info := source.tensors[partner], record):
            found[name] = extents[partner].part(*record.held_span(info))
    return found


def _joined(*notes: str | None) -> str | None:
    return "; ".join(note for note in notes if note) or None


def _check(
    name: str, record: TensorRecord, trained: TensorSource, partner: str, known: str | None, meter: Meter
) -> Difference | None:
    """One frozen tensor against its record; None if it has its dtype, shape and bits.

    Args:
        name: Its name in the manifest.
        record: Its record.
        trained: Where it is.
        partner: Its name there.
        known: The digest of its frozen part, if that is known by now.
        meter: Told what is read for it.
    """
    if known is not None:
        return None if known == record.held_digest else Difference(name=name, verdict="changed")
    info, algorithm = trained.tensors[partner], algorithm_of(record.digest)
    expected = {"expected": str(record.info), "found": str(info)}
    if not _has_room(info, record):
        return Difference(name=name, verdict="shape", detail=expected)
    held = record.held_bytes(meter.over(trained.read(partner)), info)
    is_same = _digest_in(record.dtype, held, info.dtype, algorithm) == record.held_digest
    if info.dtype != record.dtype:
        return Difference(name=name, verdict="dtype_only" if is_same else "dtype", detail=expected)
    return None if is_same else Difference(name=name, verdict="changed")


def _digest_in(dtype: str, chunks: Iterable[Buffer], own: str, algorithm: str) -> str | None:
    """The digest of a tensor of that dtype, or of one that is wider without need; None if it is neither."""
    if own == dtype:
        return digest_of(chunks, algorithm)
    from .comparing import is_wider, narrowed_digest

    return narrowed_digest(chunks, own, dtype, algorithm) if is_wider(own, dtype) else None


def _has_room(info: TensorInfo, record: TensorRecord) -> bool:
    """Whether a tensor has the shape of its record; where rows are frozen, others may have been added or taken away."""
    if record.rows is None or not info.shape:
        return info.shape == record.shape
    return info.shape[1:] == record.shape[1:] and info.shape[0] >= record.rows.stop


def _untrained(
    trainable: Mapping[str, TensorRecord], trained: TensorSource, partners: Mapping[str, str], meter: Meter, jobs: int
) -> Iterator[str]:
    """Trainable tensors of numbers with fractions that are what they were, or are not there."""
    trainable = {name: record for name, record in trainable.items() if record.dtype in FLOATS and record.info.elements}
    extents = extents_of(trained)
    lying = {
        name: (extents[partners[name]], algorithm_of(record.digest))
        for name, record in trainable.items()
        if partners.get(name) in extents and trained.tensors[partners[name]] == record.info
    }
    known = digests(lying, trained.label, meter, jobs)
    moved = set()
    still = []
    for name, record in trainable.items():
        partner = partners.get(name)
        if name in known:
            stands = known[name] == record.digest
        else:
            stands = partner is None or _has_digest(record, trained, partner, meter)
        if stands:
            still.append(name)
        else:
            moved.add(record.digest)
    # Of tied tensors a saver writes one.
    return (name for name in still if name in partners or trainable[name].digest not in moved)


def _has_digest(record: TensorRecord, trained: TensorSource, partner: str, meter: Meter) -> bool:
    """Whether a tensor is all that its record says, if in a wider dtype."""
    info = trained.tensors[partner]
    if info.shape != record.shape:
        return False
    chunks = meter.over(trained.read(partner))
    return _digest_in(record.dtype, chunks, info.dtype, algorithm_of(record.digest)) == record.digest


def _moving_twins(
    manifest: Manifest, drifted: Iterable[Difference], trained: TensorSource, partners: Mapping[str, str]
) -> set[str]:
    """Frozen tensors that moved and are equal to a trainable one, as they were before: the two are one in the model."""
    changed = {one.name: manifest.tensors[one.name] for one in drifted if one.verdict == "changed"}
    changed = {name: record for name, record in changed.items() if len(record.shape) >= 2 and record.rows is None}
    by_digest = {record.digest: name for name, record in changed.items()}
    from .comparing import same_bits

    found = set()
    for other, record in manifest.tensors.items():
        name = by_digest.get(record.digest)
        if name is None or record.frozen or other not in partners:
            continue
        if same_bits(trained.read(partners[name]), trained.read(partners[other])):
            found.add(name)
    return found


def _without_absent_twins(manifest: Manifest, drifted: list[Difference]) -> list[Difference]:
    """Of tied tensors one may be missing, if its twin is there unchanged: savers write a shared tensor once."""
    bad = {difference.name for difference in drifted}
    missing = {difference.name for difference in drifted if difference.verdict == "missing"}
    excused = {
        name
        for group in manifest.tied
        if not missing.isdisjoint(group) and not bad.issuperset(group)
        for name in group
        if name in missing
    }
    return [difference for difference in drifted if difference.name not in excused]


def _with_prefix_hint(
    manifest: Manifest, drifted: list[Difference], given: Mapping[str, TensorInfo]
) -> list[Difference]:
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
