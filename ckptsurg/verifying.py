"""Manifest x tensors -> report. One code path for files, folders and live models."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import NoReturn

from .causes import with_causes
from .comparing import compare, is_wider, narrowed_digest, same_bits
from .errors import CheckpointError, UsageError
from .manifest import Manifest, TensorRecord
from .metering import Meter, Progress
from .renaming import Renaming, align, common_prefix, renamed
from .report import Difference, DiffReport, Report
from .tensors import Buffer, TensorInfo, TensorSource, algorithm_of, digest_of
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
    meter = Meter(sum(record.info.nbytes for name, record in frozen.items() if name in partners), progress)
    drifted: list[Difference] = []
    for name, record in frozen.items():
        partner = partners.get(name)
        if partner is None:
            drifted.append(Difference(name=name, verdict="missing"))
            continue
        difference = _check(name, record, trained, partner, meter)
        if difference is not None and difference.verdict == "changed" and before is not None:
            difference = before.locate(difference, record, trained, partner)
        if difference is not None:
            drifted.append(difference)
    drifted = with_causes(_without_absent_twins(manifest, drifted), manifest.tensors)
    if not any(name in partners for name in frozen):
        drifted = _with_prefix_hint(manifest, drifted, given)
    taken = set(partners.values())
    extra = tuple(name for name in given if name not in taken)
    lacking = tuple(name for name, record in manifest.tensors.items() if not record.frozen and name not in partners)
    accepted = {"dtype_only"} if allow_widened else set()
    ok = all(difference.verdict in accepted for difference in drifted) and not (exact and (extra or lacking))
    verified = len(frozen) - sum(difference.verdict not in accepted for difference in drifted)
    return Report(ok=ok, verified=verified, drifted=tuple(drifted), extra=extra, missing_trainable=lacking)


def _check(name: str, record: TensorRecord, trained: TensorSource, partner: str, meter: Meter) -> Difference | None:
    """One frozen tensor against its record; None if it has its dtype, shape and bits."""
    info, algorithm = trained.tensors[partner], algorithm_of(record.digest)
    expected = {"expected": str(record.info), "found": str(info)}
    if info.shape != record.shape:
        return Difference(name=name, verdict="shape", detail=expected)
    if info.dtype != record.dtype:
        if is_wider(info.dtype, record.dtype):
            digest = narrowed_digest(meter.over(trained.read(partner)), info.dtype, record.dtype, algorithm)
            if digest == record.digest:
                return Difference(name=name, verdict="dtype_only", detail=expected)
        return Difference(name=name, verdict="dtype", detail=expected)
    if digest_of(meter.over(trained.read(partner)), algorithm) == record.digest:
        return None
    return Difference(name=name, verdict="changed")


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

    def locate(self, difference: Difference, record: TensorRecord, trained: TensorSource, partner: str) -> Difference:
        """A change with its place and size."""
        own = self._partners[difference.name]
        if digest_of(self._source.read(own), algorithm_of(record.digest)) != record.digest:
            self._refuse(difference.name, "has other bits")
        found = compare(_reader(self._source, own), _reader(trained, partner), record.info)
        if found is None:
            return difference
        return Difference(name=difference.name, verdict=found[0], detail=found[1])


def _without_absent_twins(manifest: Manifest, drifted: list[Difference]) -> list[Difference]:
    """Of tied tensors one may be missing, if its twin is there unchanged: savers write a shared tensor once."""
    bad = {difference.name for difference in drifted}
    missing = {difference.name for difference in drifted if difference.verdict == "missing"}
    excused = {
        name for group in manifest.tied for name in group if name in missing and any(twin not in bad for twin in group)
    }
    return [difference for difference in drifted if difference.name not in excused]


def _with_prefix_hint(
    manifest: Manifest, drifted: list[Difference], given: Mapping[str, TensorInfo]
) -> list[Difference]:
    """Where all are missing but stand under one prefix, say so; of tied tensors one is enough."""
    twins = {name: set(group) for group in manifest.tied for name in group}
    missing = {difference.name for difference in drifted}
    wanted = [{name, *twins.get(name, ())} & missing for name in missing]
    prefix = common_prefix(wanted, given)
    if prefix is None:
        return drifted
    hint = {"hint": f"all of them stand under one prefix; verify with --prefix {shown(prefix)}"}
    return [Difference(name=difference.name, verdict="missing", detail=hint) for difference in drifted]


def diff(a: TensorSource, b: TensorSource, *, progress: Progress | None = None) -> DiffReport:
    """Compare two checkpoints or models, tensor by tensor, bit by bit.

    Raises:
        CheckpointError: if one of them changes meanwhile.
        SystemFailure: if one of them cannot be read.
    """
    meter = Meter(sum(info.nbytes for name, info in a.tensors.items() if b.tensors.get(name) == info), progress)
    differences: list[Difference] = []
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
    differences += [Difference(name=name, verdict="added") for name in b.tensors if name not in a.tensors]
    return DiffReport(ok=not differences, tensors=tuple(differences))


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
