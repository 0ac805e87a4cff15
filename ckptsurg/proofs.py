"""The public functions that prove and state: paths or objects in, one call of the library, a report out.

Each imports its stages itself: what one needs (numpy, pydantic's models) would hold up the start of the others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from .checkpoints import Checkpoint
from .coercing import (
    GroupLike,
    ManifestLike,
    PathLike,
    TensorsLike,
    as_jobs,
    as_manifest,
    as_path,
    as_patterns,
    as_ranks,
    checkpoint_of,
    is_model,
    tensors_of,
)
from .errors import DocumentError, Problem
from .formats.adapter import AdapterOverBase

if TYPE_CHECKING:
    from .manifest import Manifest
    from .metering import Progress
    from .renaming import Renaming
    from .report import DiffReport, Report
    from .tensors import TensorSource

#: What messages call what the ranks are asked for; no path.
_ASKED = "the arguments"

__all__ = ["attest", "diff", "load_names", "place_for_statement", "verify", "verify_and_attest"]


def verify(
    manifest: ManifestLike,
    ckpt_or_model: TensorsLike,
    baseline: TensorsLike | None = None,
    names: Renaming | None = None,
    *,
    prefix: str | None = None,
    root: str | None = None,
    attestation: PathLike | None = None,
    exact: bool = False,
    allow_widened: bool | None = None,
    expect_trained: bool = False,
    only: str | Sequence[str] | None = None,
    jobs: int | None = None,
    progress: Progress | None = None,
    group: GroupLike = None,
) -> Report:
    """Prove that every frozen tensor has the bits that the manifest records.

    Args:
        manifest: What must hold.
        ckpt_or_model: What came back from training.
        baseline: The published tensors; with them the report says where tensors differ, and by how much. Where both
            are files, bytes are compared with it, and only where they differ are digests computed: whoever gives a
            baseline vouches for it.
        names: From the trained names to the manifest's, where they differ: a mapping or a function.
        prefix: Taken off the trained names.
        root: The manifest's root or frozen root, if it is pinned.
        attestation: The statement that the output was published with, or its envelope: whoever gives it has checked
            its signature, and it pins the root.
        exact: Whether tensors that the manifest lacks, and trainable ones that are missing, count.
        allow_widened: Whether a tensor in a wider dtype with the same values is accepted; None accepts it in a live
            model and not in a file.
        expect_trained: Whether trainable tensors that did not move, or are missing, count.
        only: Patterns over the manifest's names, as in a spec: of the others nothing is read.
        jobs: How many threads read and hash files; None for one on each processor, up to 64, or its part of them.
        progress: Called with the bytes read and the bytes in all, of this process.
        group: The process group of ``torch.distributed`` among whose processes what is read is dealt out; all of them
            call this alike, on files, and all are given the report. None for this process alone.

    Raises:
        ManifestError: if the manifest is not valid, or nothing in it is frozen.
        SpecError: if a pattern cannot be read or selects nothing.
        UsageError: if nothing selected is frozen, the root is not the manifest's, names do not fit, or the baseline is
            another checkpoint.
        CheckpointError: if the checkpoint is malformed.
        SystemFailure: if it cannot be read, or a process of the group is lost.
        PeerFailed: if another process of the group fails.
    """
    from . import verifying
    from .describing import identity
    from .ranks import refuse_unless_alike

    with as_ranks(group) as ranks, ExitStack() as stack:
        document, relied_on = ranks.broadcast(lambda: _vouched_for(manifest, root, attestation))
        wanted = document.tensors.keys() if names is None else ()
        sources: list[TensorSource] = []
        asked = [
            baseline is None,
            prefix,
            exact,
            allow_widened,
            expect_trained,
            only,
            None if callable(names) else names,
        ]

        def see() -> dict[str, object]:
            given = [ckpt_or_model] if baseline is None else [ckpt_or_model, baseline]
            sources.extend(stack.enter_context(tensors_of(one, wanted)) for one in given)
            return {**{one.label: identity(one) for one in sources}, _ASKED: asked} if ranks.size > 1 else {}

        refuse_unless_alike(ranks, see)
        trained, before = sources[0], sources[1] if baseline is not None else None
        is_file = isinstance(trained, Checkpoint | AdapterOverBase)
        report = verifying.verify(
            document,
            trained,
            baseline=before,
            names=names,
            prefix=prefix,
            exact=exact,
            allow_widened=not is_file if allow_widened is None else allow_widened,
            expect_trained=expect_trained,
            saved=not is_model(ckpt_or_model),
            note=trained.note if isinstance(trained, AdapterOverBase) else None,
            only=None if only is None else as_patterns(only),
            jobs=as_jobs(jobs, ranks),
            progress=progress,
            ranks=ranks,
        )
        ranks.gather(stack.close)  # what has changed while it was read is found by now
    return report.model_copy(update={"relied_on": relied_on})


def _vouched_for(
    manifest: ManifestLike, root: str | None, attestation: PathLike | None
) -> tuple[Manifest, Literal["pinned", "signed"] | None]:
    """The manifest, and what vouches for it.

    Raises:
        ManifestError: if it is not valid.
        UsageError: if it is not the one that was pinned or attested.
    """
    from . import verifying

    document = as_manifest(manifest)
    relied_on: Literal["pinned", "signed"] | None = None
    if attestation is not None:
        from .attesting import attested_root

        verifying.check_root(document, attested_root(as_path(attestation)))
        relied_on = "signed"
    if root is not None:
        verifying.check_root(document, root)
        relied_on = "pinned"
    return document, relied_on


def verify_and_attest(
    manifest: ManifestLike, ckpt: TensorsLike, *, jobs: int | None = None, group: GroupLike = None, **options: Any
) -> tuple[Report, bytes]:
    """``verify``, and a statement of what was found, for others to sign.

    Raises:
        UsageError: as ``verify``; and if what is verified is a live model, of which there are no files.
    """
    from . import attesting

    with as_ranks(group) as ranks, checkpoint_of(ckpt) as trained:
        document = ranks.broadcast(lambda: as_manifest(manifest))
        report = verify(document, trained, jobs=jobs, group=ranks, **options)
        return report, ranks.broadcast(lambda: attesting.of_report(document, report, trained, jobs=as_jobs(jobs)))


def attest(
    manifest: ManifestLike, ckpt: TensorsLike, *, jobs: int | None = None, progress: Progress | None = None
) -> bytes:
    """A statement of what an output is, in the form of in-toto's Statement v1, for others to sign.

    Args:
        manifest: The manifest that it was published with.
        ckpt: The output; every tensor and every file of it is read.
        jobs: How many threads read and hash; None for one on each processor, up to 64.
        progress: Called with the bytes read and the bytes in all.

    Raises:
        ManifestError: if the manifest is not valid.
        UsageError: if there is no such checkpoint, it is not the output of this manifest, or not in files.
        CheckpointError: if it is malformed, or changes meanwhile.
        SystemFailure: if it cannot be read.
    """
    from . import attesting

    document = as_manifest(manifest)
    with checkpoint_of(ckpt) as output:
        return attesting.of_output(document, output, jobs=as_jobs(jobs), progress=progress)


def place_for_statement(path: PathLike, *, overwrite: bool = False) -> Callable[[bytes], None]:
    """Where a statement may be published, refused before any work is done for it.

    Returns:
        What publishes it, given its bytes; it raises SystemFailure if the system fails, with nothing published.

    Raises:
        UsageError: if the path exists and is not to be overwritten, or holds anything but a statement.
    """
    from .attesting import is_statement
    from .publishing import publish_document
    from .targets import refuse_statement_target

    target = as_path(path)
    refuse_statement_target(target, is_statement, overwrite=overwrite)
    return partial(publish_document, path=target, overwrite=overwrite)


def diff(a: TensorsLike, b: TensorsLike, *, jobs: int | None = None, progress: Progress | None = None) -> DiffReport:
    """Compare two checkpoints, models or state dicts, tensor by tensor, bit by bit.

    Args:
        a: The one.
        b: The other.
        jobs: How many threads read; None for one on each processor, up to 64.
        progress: Called with the bytes read and the bytes in all.

    Raises:
        UsageError: if there is nothing at a path.
        CheckpointError: if a checkpoint is malformed, or changes meanwhile.
        SystemFailure: if one cannot be read.
    """
    from . import diffing

    with tensors_of(a) as one, tensors_of(b) as other:
        return diffing.diff(one, other, jobs=as_jobs(jobs), progress=progress)


def load_names(path: PathLike) -> dict[str, str]:
    """Read a map from trained names to the manifest's, YAML or JSON.

    Raises:
        DocumentError: if it does not map text to text.
    """
    from .texts import read_text

    text = read_text(as_path(path), DocumentError)
    if not isinstance(text.data, dict) or not all(
        isinstance(key, str) and isinstance(value, str) for key, value in text.data.items()
    ):
        raise DocumentError(text.label, [Problem("", "expected a map from the trained names to the manifest's")])
    return text.data
