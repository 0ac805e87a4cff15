"""Carries a plan out: lays the output out, has it written, and publishes it with its manifest."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from uuid import uuid4

from .checkpoints import Checkpoint
from .claiming import journal_beside
from .config import CONFIG_NAME
from .copying import Amounts
from .dealing import Deal, deal
from .describing import base_files, identity
from .errors import PeerFailed, SystemFailure, UsageError, system_failures
from .grafting import grafted
from .journal import Journal
from .layout import Layout, lay_out
from .manifest import MANIFEST_NAME, Manifest, SpecIdentity, TensorRecord, is_file_output, manifest_path
from .metering import Meter, Progress
from .plans import Plan
from .publishing import Staging, staged
from .ranks import ALONE, Ranks
from .spec import Spec
from .staged_folder import StagedFolder
from .targets import refuse_target
from .tensors import digest_of, refuse_unstorable
from .wording import enumerate_names, shown
from .writing import Work, Writer

__all__ = ["Destination", "convert", "dealt", "rewrite"]

_log = logging.getLogger("ckptsurg")


@dataclass(frozen=True, slots=True)
class Destination:
    """Where an output goes, and what comes with it.

    Attributes:
        out: The output: a file whose name ends in ``.safetensors``, or else a folder.
        others: Files that come along to a folder, by name inside it.
        config: New content of config.json; None where it is not edited.
        manifest_at: Where else the manifest goes; of a file output, instead of beside it.
        overwrite: Whether an earlier output is replaced.
        max_shard_size: Largest size of a shard's tensors, in bytes; None keeps the base's shards.
        link: Whether files that stay as they are become further names of the base's files.
    """

    out: Path
    others: Mapping[str, Path]
    config: bytes | None = None
    manifest_at: Path | None = None
    overwrite: bool = False
    max_shard_size: int | None = None
    link: bool = False

    @property
    def manifest_elsewhere(self) -> Path | None:
        """Where the manifest goes, if not to its own place."""
        if self.manifest_at is None or os.path.realpath(self.manifest_at) == os.path.realpath(manifest_path(self.out)):
            return None
        return self.manifest_at


def rewrite(
    spec: Spec,
    plan: Plan,
    base: Checkpoint,
    destination: Destination,
    *,
    donors: Mapping[str, Checkpoint] | None = None,
    algorithm: str = "blake3",
    inherited: Mapping[str, TensorRecord] | None = None,
    resume: bool = False,
    jobs: int = 1,
    progress: Progress | None = None,
    ranks: Ranks = ALONE,
) -> Manifest:
    """Publish the output of a plan and its manifest, whole or not at all.

    Args:
        spec: The spec that the plan was made to.
        plan: The plan.
        base: The base that it was made for.
        destination: Where the output goes.
        donors: The checkpoints that tensors are grafted from, by what the spec calls them.
        algorithm: Of the digests.
        inherited: Records of tensors whose digests need not be computed.
        resume: Whether to go on with what a run of the same work has staged that was stopped, and to leave what is
            staged if this one is.
        jobs: How many threads of each rank read, hash and write.
        progress: Told how many bytes of this rank's share are done.
        ranks: Among which the work is dealt out; all of them have the same plan and base.

    Raises:
        SpecError: if a value that is to be drawn does not fit its dtype.
        UsageError: if the output exists or would touch the base, or a tensor has a dtype that safetensors lacks.
        CheckpointError: if the base turns out to be damaged, or changes meanwhile.
        SystemFailure: if the system fails.
        PeerFailed: if another rank does.
    """
    given = donors or {}
    ranks.broadcast(lambda: _refuse_targets(destination, [base, *given.values()]))
    whole = grafted(base, plan, given)
    writer = Writer(spec, plan, whole, algorithm=algorithm, inherited=inherited or {}, jobs=jobs, link=destination.link)
    layout = _laid_out(writer, destination)
    run = _identity(spec, {"": base, **given}, layout, algorithm, is_inherited=bool(inherited))
    with _staged(writer, layout, destination, run if resume else None, ranks) as made:
        journal = Journal(journal_beside(made.place.folder, ranks.rank), run)
        records = _write(writer, made, journal, [whole, *given.values()], destination, progress, ranks)

        published: Manifest | None = None

        def publish() -> Manifest:
            nonlocal published
            assert made.staging is not None
            _write_others(made.staging, layout, whole, destination)
            manifest = Manifest.of(
                records,
                spec=SpecIdentity(name=spec.name, digest=spec.digest(algorithm)),
                base=base_files(base, algorithm),
                donors={name: base_files(given[name], algorithm) for name in sorted(given)},
                dropped=[tensor.name for tensor in plan.tensors if tensor.action == "drop"],
                algorithm=algorithm,
            )
            _publish(made.staging, manifest.to_bytes(), destination)
            published = manifest
            return manifest

        try:
            return ranks.broadcast(publish)
        except (PeerFailed, SystemFailure) as failure:
            if published is not None:
                failure.message += "; the output was published by then"
            elif made.staging is None and isinstance(failure, SystemFailure):
                failure.message += "; the output may be published"
            raise


def convert(
    plan: Plan, base: Checkpoint, destination: Destination, *, jobs: int = 1, progress: Progress | None = None
) -> None:
    """Publish the output of a plan that only copies, and no manifest. Arguments and errors are those of ``rewrite``."""
    beside = manifest_path(destination.out)
    if is_file_output(destination.out) and os.path.lexists(beside):
        raise UsageError(f"{shown(beside)}: a manifest that would speak for the output; move it, or call OUT otherwise")
    _refuse_targets(destination, [base])
    writer = Writer(Spec(version=1), plan, base, algorithm=None, inherited={}, jobs=jobs, link=destination.link)
    layout = _laid_out(writer, destination)
    with _staged(writer, layout, destination, None, ALONE) as made:
        assert made.staging is not None
        _write(writer, made, None, [base], destination, progress, ALONE)
        _write_others(made.staging, layout, base, destination)
        _publish_weights(made.staging, destination)


def dealt(plan: Plan, base: Checkpoint, ranks: int, donors: Mapping[str, Checkpoint] | None = None) -> Deal:
    """How the work on an output in the base's shards would be dealt out to so many ranks."""
    whole = grafted(base, plan, donors or {})
    return deal(lay_out(plan.output, whole, single=None, max_shard_size=None).files, ranks, whole.extents)


def _refuse_targets(destination: Destination, sources: Sequence[Checkpoint]) -> None:
    """Raise UsageError if an output may not go where it shall."""
    for source in sources:
        source.refuse_if_closed()
        with system_failures(shown(destination.out)):
            refuse_target(destination.out, destination.manifest_elsewhere, source, overwrite=destination.overwrite)


def _laid_out(writer: Writer, destination: Destination) -> Layout:
    """Where in the output everything goes."""
    base, out = writer.base, destination.out
    output = writer.plan.output
    refuse_unstorable(base.label, {tensor.output_name: tensor.info for tensor in output})
    single = out.name if is_file_output(out) else None
    return lay_out(output, base, single=single, max_shard_size=destination.max_shard_size)


def _identity(
    spec: Spec, sources: Mapping[str, Checkpoint], layout: Layout, algorithm: str, *, is_inherited: bool
) -> str:
    """What a run makes of what: two of one identity bring the same bytes to the same places, with the same records.

    Of what is in memory, or where nothing tells its version, no two runs are the same.
    """
    is_told = all(source.files and all(file.version for file in source.files) for source in sources.values())
    made_of = {name: identity(sources[name]) for name in sorted(sources)} if is_told else uuid4().hex
    headers = [[file.name, digest_of([file.header], algorithm)] for file in layout.files]
    said = [version("ckptsurg"), spec.digest(algorithm), made_of, headers, is_inherited]
    return digest_of([json.dumps(said).encode()], algorithm)


@dataclass(frozen=True, slots=True)
class _Staged:
    """An output in the making, as one rank has it.

    Attributes:
        staging: Its folder, which the first rank alone may publish.
        place: Where this one makes its part of it.
        works: What that is.
        recorded: Digests of tensors that a stopped run may have brought to their places, by name in the output.
    """

    staging: Staging | None
    place: StagedFolder
    works: Sequence[Work]
    recorded: Mapping[str, str]


@contextmanager
def _staged(
    writer: Writer, layout: Layout, destination: Destination, run: str | None, ranks: Ranks
) -> Iterator[_Staged]:
    """An output in the making, staged by the first rank; its folder is gone at the end, whatever happens."""
    share = deal(layout.files, ranks.size, writer.base.extents).shares[ranks.rank]
    with ExitStack() as stack:
        staging: Staging | None = None

        def stage() -> tuple[Path, Path | None, set[str], Mapping[str, str]]:
            nonlocal staging
            for warning in layout.warnings:
                _log.warning("%s", warning)
            out = destination.out
            with system_failures(shown(out)):
                size = layout.size + sum(path.stat().st_size for path in destination.others.values())
            there = staged(out, size, lambda staging: writer.spared(layout.files, staging), run=run)
            staging = stack.enter_context(there)
            if staging.recorded:
                staging.keep_only({file.name for file in layout.files})
            linked = writer.link(layout.files, staging)
            for file in layout.files if ranks.size > 1 or staging.recorded else ():
                if file.name not in linked:
                    staging.prepare(file.name, file.size)
            mark = staging.mark() if ranks.size > 1 else None
            return staging.folder.absolute(), mark, linked, staging.recorded

        folder, mark, linked, recorded = ranks.broadcast(stage)
        works = [
            Work(file, share[file.name], is_linked=file.name in linked) for file in layout.files if file.name in share
        ]
        if staging is None:
            assert mark is not None
            with system_failures(shown(destination.out), "nothing was published"):
                place = stack.enter_context(StagedFolder.of_first(folder, mark))
        else:
            place = staging
        yield _Staged(staging, place, works, recorded)


def _write(
    writer: Writer,
    made: _Staged,
    journal: Journal | None,
    sources: Sequence[Checkpoint],
    destination: Destination,
    progress: Progress | None,
    ranks: Ranks,
) -> Mapping[str, TensorRecord]:
    """Everything that an output holds but for its manifest and its other files, of sources that are what they were.

    Returns:
        On the first rank, the records of all tensors.
    """

    def write() -> tuple[Mapping[str, TensorRecord], Amounts]:
        meter = Meter(sum(len(work.span) for work in made.works), ranks.watched(progress))
        with system_failures(shown(destination.out), "nothing was published"):
            writer.write(made.works, made.place, meter, journal=journal, recorded=made.recorded)
        for source in sources:
            source.refuse_if_changed()
        return writer.records, writer.amounts

    records: dict[str, TensorRecord] = {}
    total = Amounts()
    for written, amounts in ranks.gather(write):
        records.update(written)
        total.update(amounts)
    if ranks.rank == 0:
        _log.info("%s", total)
    return records


def _publish(staging: Staging, content: bytes, destination: Destination) -> None:
    """The output, then the manifest where that is a file of its own.

    An old manifest goes first, so that none ever stands beside weights that it does not describe.
    """
    out, target = destination.out, destination.manifest_elsewhere
    if is_file_output(out):
        target = target or manifest_path(out)
    else:
        staging.write(MANIFEST_NAME, content)
    if target is None:
        _publish_weights(staging, destination)
        return
    with staged(target, len(content), part_of=staging) as beside:
        beside.write(target.name, content)
        if destination.overwrite:
            if is_file_output(out):
                staging.withdraw(manifest_path(out))
            beside.withdraw(target)
        _publish_weights(staging, destination)
        beside.publish_file(target.name, target, overwrite=destination.overwrite)


def _publish_weights(staging: Staging, destination: Destination) -> None:
    if is_file_output(destination.out):
        staging.publish_file(destination.out.name, destination.out, overwrite=destination.overwrite)
    else:
        staging.publish_folder(destination.out, overwrite=destination.overwrite)


def _write_others(staging: Staging, layout: Layout, base: Checkpoint, destination: Destination) -> None:
    """The files of a folder that are not of weights."""
    staging.refuse_unless_whole({file.name: file.size for file in layout.files})
    if is_file_output(destination.out):
        return
    others, config = destination.others, destination.config
    written = {file.name for file in layout.files} | ({layout.index} if layout.index else set())
    if clashing := sorted(written & set(others)):
        _log.warning("not brought along, the output has files of that name: %s", enumerate_names(clashing))
    for name, path in others.items():
        if name == CONFIG_NAME and config is not None:
            staging.write(name, config)
        elif name not in written:
            staging.copy(name, path)
    if layout.index is not None:
        staging.write(layout.index, _index(layout, base))


def _index(layout: Layout, base: Checkpoint) -> bytes:
    """An index in the form that Hugging Face writes, with the true size."""
    metadata = dict(base.index.metadata) if base.index is not None else {}
    metadata.pop("total_parameters", None)  # true of the base alone
    metadata["total_size"] = sum(tensor.info.nbytes for file in layout.files for tensor in file.tensors)
    weight_map = {tensor.output_name: file.name for file in layout.files for tensor in file.tensors}
    document = {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
    return json.dumps(document, indent=2, ensure_ascii=False).encode() + b"\n"
