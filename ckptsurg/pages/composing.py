"""From paths to a page: which document is asked for, and what has to be measured for it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from .. import api, proofs
from ..coercing import TensorsLike, tensors_of
from ..counterparts import Counterparts
from ..documents import Document
from ..errors import CheckpointError, CkptsurgError, UsageError, system_failures
from ..formats import open_checkpoint
from ..manifest import Manifest, TensorRecord, is_file_output, load_manifest, manifest_path
from ..metering import Meter, Progress
from ..patterns import unlike_parts
from ..renaming import Renaming, renamed
from ..report import DiffReport, Report
from ..tensors import FLOATS, TensorInfo, TensorSource
from ..wording import counted, enumerate_names, shown
from . import compared, model
from .changes import measure
from .entries import Change

__all__ = [
    "Composed",
    "Subject",
    "checked_subject",
    "compose_comparison",
    "compose_diff",
    "compose_output",
    "compose_plan",
]

#: What a page is about: the plan of a spec, an output by its manifest, or a checkpoint.
Subject: TypeAlias = Literal["spec", "output", "checkpoint"]
_LOOKED_AT = 1 << 20


@dataclass(frozen=True, slots=True)
class Composed:
    """A page, the document that it is of, and whether that found a difference."""

    page: model.Page
    document: Document
    ok: bool


def _subject_of(path: Path) -> Subject:
    """What stands at a path.

    Raises:
        SystemFailure: if it cannot be read.
    """
    with system_failures(shown(path)):
        if path.is_dir() or is_file_output(path):
            return "output" if manifest_path(path).exists() else "checkpoint"
        if path.suffix in (".yaml", ".yml"):
            return "spec"
        if path.suffix != ".json" or path.name.endswith(".index.json") or not path.is_file():
            return "checkpoint"
        with path.open("rb") as file:
            return "output" if b'"frozen_root"' in file.read(_LOOKED_AT) else "spec"


def checked_subject(first: Path, has_second: bool, options: Mapping[str, Any], donors: Sequence[str]) -> Subject:
    """What stands at the first path, if it goes with everything else.

    Args:
        first: The first path.
        has_second: Whether there is a second.
        options: Options of ``proofs.verify`` by name; what is None or False was not given.
        donors: Checkpoints that a spec grafts from.

    Raises:
        UsageError: if a checkpoint is missing, or an option says nothing here.
    """
    subject = _subject_of(first)
    if not has_second and subject != "output":
        what = {"spec": "a spec needs a checkpoint", "checkpoint": "has no manifest, and nothing to be compared with"}
        raise UsageError(f"{shown(first)}: {what[subject]}", hint="give a checkpoint after it")
    given = [f"--{name.replace('_', '-')}" for name, value in options.items() if value]
    if given and (subject != "output" or not has_second):
        raise UsageError(f"{', '.join(given)}: goes with a manifest and a trained checkpoint alone")
    if donors and subject != "spec":
        raise UsageError("--donor: goes with a spec alone")
    return subject


# --- A plan, an output ---------------------------------------------------------------------------------


def compose_plan(spec: Path, base: TensorsLike, label: str, donors: Mapping[str, TensorsLike]) -> Composed:
    """What a rewrite would do; donors and errors as of ``api.plan``. ``label`` is what the page calls the base."""
    document, plan = api.plan_with_spec(spec, base, donors=donors)
    named = [("name", shown(document.name))] if document.name else []
    of = [*named, ("spec", shown(spec)), ("base", shown(label))]
    return Composed(model.of_plan(plan, of=of, config=document.config), plan, ok=True)


def compose_output(path: Path) -> Composed:
    """What an output is, by its manifest. Errors are those of ``load_manifest``."""
    manifest = load_manifest(path)
    named = [("name", shown(manifest.spec.name))] if manifest.spec.name else []
    return Composed(model.of_manifest(manifest, of=[*named, ("manifest", shown(path))]), manifest, ok=True)


# --- verify --------------------------------------------------------------------------------------------


def compose_comparison(
    path: Path,
    given: TensorsLike,
    label: str,
    *,
    baseline: TensorsLike | None = None,
    names: Renaming | None = None,
    prefix: str | None = None,
    exact: bool = False,
    jobs: int | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> Composed:
    """What verify finds, and, where there is a baseline, by how much each tensor moved.

    An output that is given as a whole is a baseline too, but vouches for nothing: every digest is computed.

    Args:
        path: The manifest, or the output that it stands by.
        given: What came back from training.
        label: What the page calls that.
        baseline: The published tensors, as of ``proofs.verify``.
        names: As of ``proofs.verify``; likewise ``prefix``, ``exact`` and ``jobs``.
        prefix: Taken off the trained names.
        exact: Whether tensors that the manifest lacks, and trainable ones that are missing, count.
        jobs: How many threads read.
        progress: Called with the bytes read and the bytes in all.
        **options: Further ones of ``proofs.verify``.

    Raises:
        CkptsurgError: as ``proofs.verify``.
    """
    manifest = load_manifest(path)
    options |= {"names": names, "prefix": prefix, "exact": exact, "jobs": jobs, "progress": progress}
    with ExitStack() as stack:
        trained = stack.enter_context(tensors_of(given))
        before: TensorSource | None = None
        if baseline is not None:
            before = stack.enter_context(tensors_of(baseline))
        elif path.is_dir() or is_file_output(path):
            before = _output_at(path, stack)
        report, before = _verified(manifest, trained, before, vouched=baseline is not None, options=options)
        changes = {}
        if before is not None:
            called = renamed(trained.tensors, names, prefix)
            after = Counterparts(manifest, trained, called)
            published = Counterparts(manifest, before, {name: name for name in before.tensors})
            changes = _changes(manifest, report, published, after, progress)
    of = [("manifest", shown(path)), ("checkpoint", shown(label))]
    of += [("changes are measured from", before.label)] if before is not None else []
    return Composed(compared.of_report(report, manifest, changes, of=of, exact=exact), report, report.ok)


class _Unvouched:
    """Tensors that are looked at only where something differs: none of them stands for a digest."""

    def __init__(self, source: TensorSource) -> None:
        self.label, self.tensors, self.metadata, self.read = source.label, source.tensors, source.metadata, source.read


def _output_at(path: Path, stack: ExitStack) -> TensorSource | None:
    """The tensors of an output; None where its weights have gone."""
    try:
        return _Unvouched(stack.enter_context(open_checkpoint(path)))
    except (UsageError, CheckpointError):
        return None


def _verified(
    manifest: Manifest,
    trained: TensorSource,
    before: TensorSource | None,
    *,
    vouched: bool,
    options: Mapping[str, Any],
) -> tuple[Report, TensorSource | None]:
    """The report, and the baseline if it is one: an output that was trained in its place has no numbers to give."""
    try:
        return proofs.verify(manifest, trained, before, **options), before
    except UsageError:
        if before is None or vouched:
            raise
        return proofs.verify(manifest, trained, **options), None


def _changes(
    manifest: Manifest, report: Report, before: Counterparts, after: Counterparts, progress: Progress | None
) -> dict[str, Change]:
    """By how much tensors changed: the frozen ones that did, in their frozen part, and all that may."""
    drifted = {difference.name for difference in report.drifted}
    wanted: dict[str, tuple[TensorRecord, TensorInfo, TensorInfo]] = {}
    for name, record in manifest.tensors.items():
        old, new = before.tensors.get(name), after.tensors.get(name)
        if old != record.info or new is None or not (name in drifted or record.trains):
            continue
        held = record if name in drifted else record.model_copy(update={"rows": None})
        if new.shape == old.shape and _is_measurable(old, new):
            wanted[name] = held, old, new
    meter = Meter(sum(new.nbytes for _, _, new in wanted.values()), progress)
    return {
        name: measure(
            record.held_bytes(before.read(name), old),
            record.held_bytes(meter.over(after.read(name)), new),
            record.held,
            TensorInfo(new.dtype, record.held.shape),
        )
        for name, (record, old, new) in wanted.items()
    }


def _is_measurable(old: TensorInfo, new: TensorInfo) -> bool:
    """Whether values can be set against each other: of one dtype, or numbers with fractions in both."""
    return old.dtype == new.dtype or {old.dtype, new.dtype} <= FLOATS


# --- diff ----------------------------------------------------------------------------------------------


def compose_diff(
    a: TensorsLike,
    b: TensorsLike,
    labels: tuple[str, str],
    *,
    jobs: int | None = None,
    progress: Progress | None = None,
) -> Composed:
    """Two checkpoints, and by how much each tensor changed. Errors are those of ``proofs.diff``."""
    with tensors_of(a) as one, tensors_of(b) as other:
        report = proofs.diff(one, other, jobs=jobs, progress=progress)
        changes = dict(_differences(report, one, other, progress))
        infos = one.tensors, other.tensors
    of = [("first", shown(labels[0])), ("second", shown(labels[1]))]
    notes = _names_that_changed(infos[0], Path(labels[1]))
    return Composed(compared.of_diff(report, infos, changes, of=of, notes=notes), report, report.ok)


def _names_that_changed(first: Iterable[str], second: Path) -> list[str]:
    """That an output calls the first checkpoint's tensors otherwise, where its manifest says so."""
    try:
        tensors = load_manifest(second).tensors if _subject_of(second) == "output" else {}
    except (CkptsurgError, OSError):
        return []  # a manifest that cannot be read says nothing
    called = {record.base_name: name for name, record in tensors.items() if record.base_name is not None}
    pairs = [(old, called[old]) for old in first if old in called]
    if not pairs:
        return []
    parts = dict.fromkeys(unlike_parts(old, new) for old, new in pairs)
    told = enumerate_names(f"{old} -> {new}" for old, new in parts)
    others = f"{counted(len(pairs))} of the first {'is' if len(pairs) == 1 else 'are'} called otherwise in the second"
    return [f"{others}, as its manifest says: {told}. Here tensors of one name are compared, whatever they were called"]


def _differences(
    report: DiffReport, a: TensorSource, b: TensorSource, progress: Progress | None
) -> Iterator[tuple[str, Change]]:
    def wanted(name: str) -> bool:
        old, new = a.tensors.get(name), b.tensors.get(name)
        return old is not None and new is not None and old.shape == new.shape and _is_measurable(old, new)

    names = [difference.name for difference in report.tensors if wanted(difference.name)]
    meter = Meter(sum(b.tensors[name].nbytes for name in names), progress)
    for name in names:
        yield name, measure(a.read(name), meter.over(b.read(name)), a.tensors[name], b.tensors[name])
