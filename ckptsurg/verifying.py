"""Manifest x tensors -> report. One code path for files, folders and live models."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import NoReturn

from .comparing import compare, is_wider, narrowed_digest, same_bits, was_cast
from .errors import CheckpointError, UsageError
from .manifest import Manifest, TensorRecord
from .metering import Meter, Progress
from .renaming import Renaming, align, common_prefix, renamed, unwrapped
from .report import Difference, DiffReport, Report
from .settling import Evidence, with_causes
from .tensors import DTYPE_BITS, Buffer, TensorInfo, TensorSource, algorithm_of, digest_of, refuse_unstorable
from .traits import FLOATS, Traits
from .wording import shown

__all__ = ["check_root", "diff", "verify"]


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
    progress: Progress | None = None,
) -> Report:
    """Prove that every frozen tensor has the bits that the manifest records.

    Args:
        manifest: What must hold.
        trained: What came back from training.
        baseline: The tensors that the manifest describes; with them the report says where tensors differ.
        names: From names of ``trained`` to names of the manifest.
        prefix: Taken off the names of ``trained``.
        exact: Whether tensors that the manifest lacks, and trainable ones that are missing, count.
        allow_widened: Whether a tensor in a wider dtype with the same values is accepted.
        expect_trained: Whether trainable tensors that did not move, or are missing, count.
        witnessed: Causes that were seen while the model trained, by name; None where nobody watched.
        saved: Whether ``trained`` was saved, so that what it lacks was left out; a live model is not.
        also_given: Further names of the other side, that stand for none of the manifest's.
        note: What the report says besides.
        progress: Told how many bytes are read.

    Raises:
        ManifestError: if nothing is frozen.
        UsageError: if names do not fit, or the baseline is not what the manifest describes.
    """
    manifest.require_frozen()
    given = trained.tensors
    partners = align(manifest.tensors, renamed(given, names, prefix))
    frozen = manifest.frozen
    before = None if baseline is None else _Baseline(manifest, baseline)
    trainable = {name: record for name, record in manifest.tensors.items() if record.trains} if expect_trained else {}
    read = [
        record.info.nbytes for records in (frozen, trainable) for name, record in records.items() if name in partners
    ]
    meter = Meter(sum(read), progress)
    drifted: list[Difference] = []
    traits: dict[str, Traits] = {}
    for name, record in frozen.items():
        partner = partners.get(name)
        if partner is None:
            drifted.append(Difference(name=name, verdict="missing"))
            continue
        difference = _check(name, record, trained, partner, meter)
        if difference is not None and before is not None:
            difference, how = before.locate(difference, record, trained, partner)
            if how is not None:
                traits[name] = how
        if difference is not None:
            drifted.append(difference)
    drifted = _without_absent_twins(manifest, drifted)
    bad = {difference.name for difference in drifted}
    vectors = [name for name, r in frozen.items() if len(r.shape) == 1 and r.dtype in FLOATS and name not in bad]
    evidence = Evidence(
        names=manifest.tensors.keys(),
        given={unwrapped(name) for name in (*given, *also_given)} if drifted else (),
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
    extra = tuple(name for name in given if name not in taken)
    lacking = tuple(name for name, record in manifest.tensors.items() if not record.frozen and name not in partners)
    untrained = tuple(_untrained(trainable, trained, partners, meter)) if expect_trained else None
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


def _check(name: str, record: TensorRecord, trained: TensorSource, partner: str, meter: Meter) -> Difference | None:
    """One frozen tensor against its record; None if it has its dtype, shape and bits."""
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
    return narrowed_digest(chunks, own, dtype, algorithm) if is_wider(own, dtype) else None


def _has_room(info: TensorInfo, record: TensorRecord) -> bool:
    """Whether a tensor has the shape of its record; where rows are frozen, others may have been added or taken away."""
    if record.rows is None or not info.shape:
        return info.shape == record.shape
    return info.shape[1:] == record.shape[1:] and info.shape[0] >= record.rows.stop


def _untrained(
    trainable: Mapping[str, TensorRecord], trained: TensorSource, partners: Mapping[str, str], meter: Meter
) -> Iterator[str]:
    """Trainable tensors of numbers with fractions that are what they were, or are not there."""
    moved = set()
    still = []
    for name, record in trainable.items():
        if record.dtype not in FLOATS or not record.info.elements:
            continue
        partner = partners.get(name)
        if partner is None or _has_digest(record, trained, partner, meter):
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
    found = set()
    for other, record in manifest.tensors.items():
        name = by_digest.get(record.digest)
        if name is None or record.frozen or other not in partners:
            continue
        if same_bits(trained.read(partners[name]), trained.read(partners[other])):
            found.add(name)
    return found


class _Baseline:
    """The tensors that a manifest describes, with which changes are located.

    Raises:
        UsageError: if they are not those tensors.
    """

    def __init__(self, manifest: Manifest, source: TensorSource) -> None:
        self._source = source
        self._partners = align(manifest.tensors, {name: name for name in source.tensors})
        for name, record in manifest.frozen.items():
            if name not in self._partners or source.tensors[self._partners[name]] != record.info:
                self._refuse(name, "is missing, or has another dtype or shape")

    def _refuse(self, name: str, reason: str) -> NoReturn:
        raise UsageError(
            f'{self._source.label}: is not the baseline of this manifest: "{shown(name)}" {reason}',
            hint="the baseline is the output that the manifest was published with",
        )

    def locate(
        self, difference: Difference, record: TensorRecord, trained: TensorSource, partner: str
    ) -> tuple[Difference, Traits | None]:
        """A change with its place, its size and its traits."""
        if difference.verdict not in ("changed", "dtype"):
            return difference, None
        own, info = self._partners[difference.name], trained.tensors[partner]
        if digest_of(self._source.read(own), algorithm_of(record.digest)) != record.digest:
            self._refuse(difference.name, "has other bits")

        def before() -> Iterator[Buffer]:
            return iter(record.held_bytes(self._source.read(own), record.info))

        def after() -> Iterator[Buffer]:
            return iter(record.held_bytes(trained.read(partner), info))

        if difference.verdict == "dtype":
            cast = was_cast(before, after, record.dtype, info.dtype)
            return difference, Traits.of_cast(info.dtype) if cast else None
        found = compare(before, after, record.held)
        if found is None:
            return difference, None
        verdict, detail, traits = found
        if record.rows is not None:
            first, *rest = detail.first_index
            detail = detail.model_copy(update={"first_index": (first + record.rows.start, *rest)})
        return Difference(name=difference.name, verdict=verdict, detail=detail), traits


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


def diff(a: TensorSource, b: TensorSource, *, progress: Progress | None = None) -> DiffReport:
    """Compare two checkpoints or models, tensor by tensor, bit by bit.

    Raises:
        UsageError: if a dtype is one that safetensors does not have.
        CheckpointError: if one of them changes meanwhile.
        SystemFailure: if one of them cannot be read.
    """
    for source in (a, b):
        refuse_unstorable(source.label, source.tensors)
    meter = Meter(sum(info.nbytes for name, info in a.tensors.items() if b.tensors.get(name) == info), progress)
    differences: list[Difference] = []
    traits: dict[str, Traits] = {}
    for name, info in a.tensors.items():
        other = b.tensors.get(name)
        if other is None:
            differences.append(Difference(name=name, verdict="removed"))
        elif other != info:
            differences.append(_differing_info(name, a, b))
        elif not same_bits(meter.over(a.read(name)), b.read(name)):
            found = compare(_reader(a, name), _reader(b, name), info)
            if found is None:
                raise CheckpointError(f'{a.label}, {b.label}: "{shown(name)}" changed while it was compared')
            differences.append(Difference(name=name, verdict=found[0], detail=found[1]))
            traits[name] = found[2]
    changed = {difference.name for difference in differences}
    evidence = Evidence(
        names=a.tensors.keys(),
        given={unwrapped(name) for name in b.tensors} if differences else (),
        ranks={name: len(info.shape) for name, info in a.tensors.items() if info.dtype in FLOATS},
        traits=traits,
        standing={name for name in a.tensors if name not in changed and _has_counted(a, name)} if changed else (),
    )
    differences = with_causes(differences, evidence)
    differences += [Difference(name=name, verdict="added") for name in b.tensors if name not in a.tensors]
    return DiffReport(ok=not differences, tensors=tuple(differences))


def _has_counted(source: TensorSource, name: str) -> bool:
    return name.endswith("num_batches_tracked") and any(any(bytes(chunk)) for chunk in source.read(name))


def _reader(source: TensorSource, name: str) -> Callable[[], Iterator[Buffer]]:
    return lambda: source.read(name)


def _differing_info(name: str, a: TensorSource, b: TensorSource) -> Difference:
    one, other = a.tensors[name], b.tensors[name]
    detail = {"expected": str(one), "found": str(other)}
    if one.shape != other.shape:
        return Difference(name=name, verdict="shape", detail=detail)
    narrow, wide = (a, b) if is_wider(other.dtype, one.dtype) else (b, a)
    n, w = narrow.tensors[name].dtype, wide.tensors[name].dtype
    if is_wider(w, n) and narrowed_digest(wide.read(name), w, n, "blake3") == digest_of(narrow.read(name)):
        return Difference(name=name, verdict="dtype_only", detail=detail)
    return Difference(name=name, verdict="dtype", detail=detail)
