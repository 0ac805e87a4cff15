"""The public functions on checkpoints: paths or objects in, one call of the library, a document out.

Each imports its stages itself: what one needs (numpy, pydantic's models) would hold up the start of the others.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .checkpoints import Checkpoint
from .coercing import (
    GroupLike,
    PathLike,
    SpecLike,
    TensorsLike,
    as_algorithm,
    as_jobs,
    as_path,
    as_ranks,
    as_size,
    as_spec,
    as_spec_or_patterns,
    as_target,
    checkpoint_of,
    donors_of,
    tensors_of,
)
from .errors import SpecError, UsageError, system_failures
from .formats import endings
from .formats.adapter import AdapterOverBase
from .wording import shown

if TYPE_CHECKING:
    from .dealing import Deal
    from .inspection import Inspection
    from .manifest import Manifest, TensorRecord
    from .metering import Progress
    from .planning.explaining import Explanation
    from .plans import Plan
    from .ranks import Ranks
    from .spec import Spec

_log = logging.getLogger("ckptsurg")

__all__ = [
    "convert",
    "dealt",
    "explain",
    "inspect",
    "make_manifest",
    "place_for_manifest",
    "place_for_plan",
    "plan",
    "plan_with_spec",
    "rewrite",
    "write_manifest",
]


def inspect(ckpt: TensorsLike, patterns: Sequence[str] = ()) -> Inspection:
    """The contents of a checkpoint, or what patterns select of it. Of safetensors only headers are read.

    Raises:
        SpecError: if a pattern cannot be read or selects nothing.
        UsageError: if there is no checkpoint at the path.
        CheckpointError: if it is malformed.
        SystemFailure: if it cannot be read.
    """
    from .inspection import inspect_checkpoint

    with checkpoint_of(ckpt) as opened:
        return inspect_checkpoint(opened, patterns)


def plan(spec: SpecLike, ckpt: TensorsLike, *, donors: Mapping[str, TensorsLike] | None = None) -> Plan:
    """What a rewrite would do. Of safetensors only headers are read; nothing is written.

    Args:
        spec: The spec.
        ckpt: The base.
        donors: Other checkpoints that tensors are grafted from, by what the spec calls them.

    Raises:
        SpecError: if the spec is not valid or does not fit the checkpoint.
        UsageError: if there is no spec or checkpoint at the path.
        CheckpointError: if the checkpoint is malformed.
        SystemFailure: if it cannot be read.
    """
    return plan_with_spec(spec, ckpt, donors=donors)[1]


def plan_with_spec(
    spec: SpecLike, ckpt: TensorsLike, *, donors: Mapping[str, TensorsLike] | None = None, reviewed: bool = False
) -> tuple[Spec, Plan]:
    """The plan, and the spec that it was made to, which is read once.

    Args:
        spec: The spec.
        ckpt: The base.
        donors: As of ``plan``.
        reviewed: Whether the plan is to say what it was made of, so that ``rewrite`` can carry it out.
    """
    from .preparing import prepared

    with checkpoint_of(ckpt) as base, donors_of(donors) as given:
        document = as_spec(spec, base, given)
        done = prepared(document, base, given)
        return document, done.reviewed(document, base, given) if reviewed else done.plan


def dealt(plan: Plan, ckpt: TensorsLike, ranks: int, *, donors: Mapping[str, TensorsLike] | None = None) -> Deal:
    """How the work on an output in the base's shards would be dealt out to processes. Only headers are read.

    Args:
        plan: The plan.
        ckpt: The base that it was made for.
        ranks: How many processes.
        donors: As of ``plan``.

    Raises:
        UsageError, CheckpointError, SystemFailure: as ``plan``.
    """
    from . import rewriting

    with checkpoint_of(ckpt) as base, donors_of(donors) as given:
        return rewriting.dealt(plan, base, ranks, given)


def explain(
    spec: SpecLike, ckpt: TensorsLike, name: str, *, donors: Mapping[str, TensorsLike] | None = None
) -> Explanation:
    """Why a tensor has its fate: which patterns took it, and which gave it away.

    Args:
        spec: The spec.
        ckpt: The base.
        name: Of the tensor, in the base or in the output.
        donors: As of ``plan``.

    Raises:
        UsageError: if there is no such tensor; otherwise as ``plan``.
    """
    from .planning.explaining import explain
    from .preparing import prepared

    with checkpoint_of(ckpt) as base, donors_of(donors) as given:
        document = as_spec(spec, base, given)
        return explain(document, base, prepared(document, base, given).plan, name)


def rewrite(
    spec: SpecLike,
    ckpt: TensorsLike,
    out: PathLike,
    *,
    donors: Mapping[str, TensorsLike] | None = None,
    manifest: PathLike | None = None,
    overwrite: bool = False,
    max_shard_size: int | str | None = None,
    digest: str = "blake3",
    keep_other_weights: bool = False,
    link: bool = False,
    trust_base_manifest: bool = False,
    resume: bool = False,
    jobs: int | None = None,
    progress: Progress | None = None,
    group: GroupLike = None,
) -> Manifest:
    """Publish the checkpoint that a spec describes, and its manifest, whole or not at all.

    Args:
        spec: The spec; or a plan that was kept, with what it was made of: it is carried out as it is.
        ckpt: The base.
        out: The output: a file whose name ends in ``.safetensors``, or else a folder.
        donors: Other checkpoints that tensors are grafted from, by what the spec calls them.
        manifest: Where else to put the manifest; for a file output, instead of beside it.
        overwrite: Whether to replace an earlier output.
        max_shard_size: Largest size of a shard's tensors, in bytes or as ``5GB`` (10^9); None keeps the base's.
        digest: ``blake3`` or ``sha256``.
        keep_other_weights: Whether other files of weights in the base's folder come along.
        link: Whether shards that stay as they are become further names of the base's own files (hard links). Whoever
            writes to one then writes to both.
        trust_base_manifest: Whether digests of copied tensors are taken from the manifest that the base was published
            with, and not computed; the manifest says which.
        resume: Whether to go on where a run that was stopped has left off: what it has staged is read, and kept where
            it has the digest that was recorded. If this run is stopped, what it has staged stays for the next.
        jobs: How many threads read, hash and write; None for one on each processor, up to 64, or its part of them.
        progress: Called with the bytes done and the bytes in all, of this process.
        group: The process group of ``torch.distributed`` among whose processes the work is dealt out; all of them call
            this alike. None for this process alone.

    Raises:
        SpecError: if the spec is not valid or does not fit the checkpoint.
        UsageError: if the output exists, would touch the base, the base has no manifest to be trusted, or is not what
            the plan was made of.
        CheckpointError: if the checkpoint is malformed, or changes meanwhile.
        SystemFailure: if the system fails, or a process of the group is lost; nothing is published then, unless the
            message says so.
        PeerFailed: if another process of the group fails.
    """
    from . import rewriting
    from .describing import inherited_records
    from .manifest import is_file_output
    from .preparing import kept_plan, prepared, spec_of

    with as_ranks(group) as ranks, ExitStack() as stack:
        target, algorithm = as_target(out), as_algorithm(digest)
        base, given = _opened_by_all(ranks, stack, ckpt, donors)

        def prepare() -> tuple[Spec, Plan, rewriting.Destination, str, Mapping[str, TensorRecord] | None]:
            kept = kept_plan(spec)
            document = as_spec(spec, base, given) if kept is None else spec_of(kept)
            done = prepared(document, base, given)
            if kept is not None:
                done.refuse_unlike(kept, document, base, given)
            if done.config is not None and is_file_output(target):
                message = f"{shown(target)} is a lone file and has no config.json; give a folder, or leave `config` out"
                raise SpecError(document.label, [document.problem(("config",), message)])
            for note in done.plan.notes:
                _log.info("note: %s", note)
            destination = rewriting.Destination(
                target,
                _companions(base, target, keep_other_weights=keep_other_weights),
                done.config,
                None if manifest is None else as_path(manifest),
                overwrite,
                as_size(max_shard_size),
                link,
            )
            inherited = inherited_records(base, algorithm) if trust_base_manifest else None
            return document, done.plan, destination, algorithm, inherited

        document, planned, destination, algorithm, inherited = ranks.broadcast(prepare)
        return rewriting.rewrite(
            document,
            planned,
            base,
            destination,
            donors=given,
            algorithm=algorithm,
            inherited=inherited,
            resume=resume,
            jobs=as_jobs(jobs, ranks),
            progress=progress,
            ranks=ranks,
        )


def _opened_by_all(
    ranks: Ranks, stack: ExitStack, ckpt: TensorsLike, donors: Mapping[str, TensorsLike] | None
) -> tuple[Checkpoint, Mapping[str, Checkpoint]]:
    """A base and donors, opened by every rank; refused where two of them see others.

    Raises:
        UsageError: if they do, or there is no checkpoint.
        CheckpointError: if one is malformed.
        SystemFailure: if one cannot be read.
    """
    from .describing import identity
    from .ranks import refuse_unless_alike

    opened: list[tuple[Checkpoint, Mapping[str, Checkpoint]]] = []

    def see() -> dict[str, object]:
        base, given = stack.enter_context(checkpoint_of(ckpt)), stack.enter_context(donors_of(donors))
        opened.append((base, given))
        if ranks.size == 1:
            return {}
        called: dict[str, object] = {f"the donor {shown(name)}": one.label for name, one in given.items()}
        return {**called, **{one.label: identity(one) for one in (base, *given.values())}}

    refuse_unless_alike(ranks, see)
    return opened[0]


def convert(
    ckpt: TensorsLike,
    out: PathLike,
    *,
    overwrite: bool = False,
    max_shard_size: int | str | None = None,
    keep_other_weights: bool = False,
    link: bool = False,
    jobs: int | None = None,
    progress: Progress | None = None,
) -> Inspection:
    """Publish a checkpoint as safetensors: the same tensors in another container, whole or not at all.

    Args:
        ckpt: What is converted.
        out: A file whose name ends in ``.safetensors``, or else a folder.
        overwrite: Whether to replace a file; a folder only if it holds a manifest, which this writes none of.
        max_shard_size: Largest size of a shard's tensors, in bytes or as ``5GB`` (10^9); None keeps the shards.
        keep_other_weights: Whether other files of weights in the folder come along.
        link: Whether shards that stay as they are become further names of the same files (hard links).
        jobs: How many threads read and write; None for one on each processor, up to 64.
        progress: Called with the bytes done and the bytes in all.

    Returns:
        The contents of the output.

    Raises:
        UsageError: if the output exists, would touch what is converted, or a tensor has a dtype that safetensors lacks.
        CheckpointError: if the checkpoint is malformed, or changes meanwhile.
        SystemFailure: if the system fails; nothing is published then.
    """
    from . import planning, rewriting
    from .spec import Spec

    target = as_target(out)
    if target.name.endswith((*endings.TORCH, *endings.KERAS)):
        raise UsageError(
            f"{shown(target)}: what is written is safetensors; end the name in .safetensors, or name a folder"
        )
    with checkpoint_of(ckpt) as base:
        others = _companions(base, target, keep_other_weights=keep_other_weights)
        size = as_size(max_shard_size)
        destination = rewriting.Destination(target, others, overwrite=overwrite, max_shard_size=size, link=link)
        for warning in base.warnings:
            _log.info("note: %s", warning)
        planned = planning.plan(Spec(version=1), base)
        rewriting.convert(planned, base, destination, jobs=as_jobs(jobs), progress=progress)
    return inspect(target)


def make_manifest(
    spec_or_patterns: SpecLike | Iterable[str | Mapping[str, Any]],
    ckpt_or_model: TensorsLike,
    *,
    digest: str = "blake3",
    trust_base_manifest: bool = False,
    jobs: int | None = None,
    progress: Progress | None = None,
) -> Manifest:
    """The manifest alone, of a checkpoint or live model that is trained as it is.

    Args:
        spec_or_patterns: A spec that drops, reinitialises, adds and edits nothing; its path; or freeze patterns,
            such as ``"**"`` or ``["**", "!fc"]``.
        ckpt_or_model: What is described.
        digest: ``blake3`` or ``sha256``.
        trust_base_manifest: Whether digests are taken from the manifest that the checkpoint was published with, and
            not computed; the manifest says which.
        jobs: How many threads read and hash; None for one on each processor, up to 64.
        progress: Called with the bytes read and the bytes in all.

    Raises:
        SpecError: if the spec does anything but freeze, or does not fit.
        UsageError: if there is no spec or checkpoint at the path, or no manifest to be trusted.
        CheckpointError: if the checkpoint is malformed, or changes meanwhile.
        FreezeError: if a tensor of a live model cannot be read.
        SystemFailure: if the checkpoint cannot be read.
    """
    from . import planning
    from .describing import describe, inherited_records

    with tensors_of(ckpt_or_model) as source:
        if isinstance(source, AdapterOverBase):
            raise UsageError(f"{source.label}: an adapter alone", hint="make the manifest of its base")
        spec = as_spec_or_patterns(spec_or_patterns, source)
        acting = [key for key in ("drop", "reinit", "add", "cast", "graft", "rename", "config") if getattr(spec, key)]
        if acting:
            problems = [spec.problem((key,), "changes the checkpoint; a manifest alone only freezes") for key in acting]
            raise SpecError(spec.label, problems, hint="`ckptsurg rewrite` publishes the output with its manifest")
        planned = planning.plan(spec, source)
        for note in planned.notes:
            _log.info("note: %s", note)
        algorithm = as_algorithm(digest)
        return describe(
            spec,
            planned,
            source,
            algorithm=algorithm,
            inherited=inherited_records(source, algorithm) if trust_base_manifest else None,
            jobs=as_jobs(jobs),
            progress=progress,
        )


def write_manifest(manifest: Manifest, path: PathLike, *, overwrite: bool = False) -> None:
    """Publish a manifest by itself.

    Raises:
        UsageError: if the path exists and is not to be overwritten, or holds anything but a manifest.
        SystemFailure: if the system fails; nothing is published then.
    """
    place_for_manifest(path, overwrite=overwrite)(manifest.to_bytes())


def place_for_manifest(path: PathLike, *, overwrite: bool = False) -> Callable[[bytes], None]:
    """Where a manifest may be published, refused before any work is done for it; arguments as of ``write_manifest``.

    Returns:
        What publishes it, given its bytes.
    """
    from .publishing import publish_document
    from .targets import refuse_manifest_target

    target = as_path(path)
    refuse_manifest_target(target, overwrite=overwrite)
    return partial(publish_document, path=target, overwrite=overwrite)


def place_for_plan(path: PathLike, *, overwrite: bool = False) -> Callable[[bytes], None]:
    """Where a plan may be kept, refused before any work is done for it; as ``place_for_manifest``."""
    from .publishing import publish_document
    from .targets import refuse_plan_target

    target = as_path(path)
    if not target.name.endswith(".json"):
        raise UsageError(f"{shown(target)}: the name of a plan ends in .json, by which rewrite knows it")
    refuse_plan_target(target, overwrite=overwrite)
    return partial(publish_document, path=target, overwrite=overwrite)


def _companions(base: Checkpoint, out: Path, *, keep_other_weights: bool) -> dict[str, Path]:
    """The files that come along to an output, which a lone file has none of."""
    from .formats.folder import companions
    from .manifest import is_file_output

    if is_file_output(out):
        return {}
    with system_failures(base.label):
        return companions(base, keep_other_weights=keep_other_weights)
