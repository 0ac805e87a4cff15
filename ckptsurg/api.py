"""The public functions: paths or objects in, one call of the library, a document out."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, cast

from . import planning, rewriting, verifying
from .aligning import Renaming
from .checkpoints import Checkpoint
from .config import edited_config
from .documents import Document
from .errors import DocumentError, Problem, SpecError, UsageError, shown, system_failures
from .formats import open_checkpoint
from .formats.folder import companions
from .inspection import Inspection, inspect_checkpoint
from .manifest import Manifest, load_manifest
from .plans import Plan
from .report import DiffReport, Report
from .selectors import unmatched
from .spec import Spec, load_spec
from .tensors import ALGORITHMS, TensorSource
from .texts import Text, read_text

if TYPE_CHECKING:
    import torch

    from .integrations.pytorch import FrozenModel

__all__ = [
    "diff",
    "freeze",
    "inspect",
    "load_manifest",
    "load_names",
    "load_spec",
    "make_manifest",
    "plan",
    "rewrite",
    "schema",
    "verify",
    "write_manifest",
]

PathLike: TypeAlias = "str | Path"
SpecLike: TypeAlias = "PathLike | Spec | Mapping[str, Any]"
ManifestLike: TypeAlias = "PathLike | Manifest"
#: A checkpoint, by path or opened; a live model; a state dict.
TensorsLike: TypeAlias = "PathLike | TensorSource | torch.nn.Module | Mapping[str, torch.Tensor]"
Progress: TypeAlias = Callable[[int, int], None]


def inspect(ckpt: PathLike | Checkpoint, patterns: Sequence[str] = ()) -> Inspection:
    """The contents of a checkpoint, or what patterns select of it. Only headers are read.

    Raises:
        SpecError: if a pattern cannot be read or selects nothing.
        CheckpointError: if the checkpoint is malformed.
    """
    with _checkpoint(ckpt) as opened:
        return inspect_checkpoint(opened, patterns)


def plan(spec: SpecLike, ckpt: PathLike | Checkpoint) -> Plan:
    """What a rewrite would do. Only headers are read, nothing is written.

    Raises:
        SpecError: if the spec is not valid or does not fit the checkpoint.
        CheckpointError: if the checkpoint is malformed.
    """
    with _checkpoint(ckpt) as base:
        return _plan(_spec(spec, base), base)[0]


def rewrite(
    spec: SpecLike,
    ckpt: PathLike | Checkpoint,
    out: PathLike,
    *,
    manifest: PathLike | None = None,
    overwrite: bool = False,
    max_shard_size: int | str | None = None,
    digest: str = "blake3",
    keep_other_weights: bool = False,
    progress: Progress | None = None,
) -> Manifest:
    """Publish the checkpoint that a spec describes, and its manifest, whole or not at all.

    Args:
        spec: The spec.
        ckpt: The base.
        out: The output: a file whose name ends in ``.safetensors``, or else a folder.
        manifest: Where else to put the manifest; for a file output, instead of beside it.
        overwrite: Whether to replace an earlier output.
        max_shard_size: Largest size of a shard's tensors, in bytes or as ``5GB`` (10^9); None keeps the base's.
        digest: ``blake3`` or ``sha256``.
        keep_other_weights: Whether other files of weights in the base's folder come along.
        progress: Called with the bytes written and the bytes in all.

    Raises:
        SpecError: if the spec is not valid or does not fit the checkpoint.
        UsageError: if the output exists, or would touch the base.
        CheckpointError: if the checkpoint is malformed, or changes meanwhile.
        SystemFailure: if the system fails; nothing is published then.
    """
    with _checkpoint(ckpt) as base:
        spec = _spec(spec, base)
        planned, config = _plan(spec, base)
        with system_failures(base.label):
            others, left = companions(base, keep_other_weights=keep_other_weights)
        if left and not str(out).endswith(".safetensors"):
            rewriting.say_left_behind(left)
        return rewriting.rewrite(
            spec,
            planned,
            base,
            Path(out),
            others=others,
            config=config,
            manifest=None if manifest is None else Path(manifest),
            overwrite=overwrite,
            max_shard_size=_size(max_shard_size),
            algorithm=_algorithm(digest),
            progress=progress,
        )


def make_manifest(
    spec_or_patterns: SpecLike | Iterable[str | Mapping[str, Any]],
    ckpt_or_model: TensorsLike,
    *,
    digest: str = "blake3",
    progress: Progress | None = None,
) -> Manifest:
    """The manifest alone, of a checkpoint or live model that is trained as it is.

    Args:
        spec_or_patterns: A spec that drops, reinitialises, adds and edits nothing; its path; or freeze patterns,
            such as ``"**"`` or ``["**", "!fc"]``.
        ckpt_or_model: What is described.
        digest: ``blake3`` or ``sha256``.
        progress: Called with the bytes read and the bytes in all.

    Raises:
        SpecError: if the spec does anything but freeze, or does not fit.
    """
    with _source(ckpt_or_model) as source:
        spec = _spec_or_patterns(spec_or_patterns, source)
        acting = [key for key in ("drop", "reinit", "add", "config") if getattr(spec, key)]
        if acting:
            problems = [spec.problem((key,), "changes the checkpoint; a manifest alone only freezes") for key in acting]
            raise SpecError(spec.label, problems, hint="`ckptsurg rewrite` publishes the output with its manifest")
        planned = planning.plan(spec, source)
        return rewriting.describe(spec, planned, source, algorithm=_algorithm(digest), progress=progress)


def verify(
    manifest: ManifestLike,
    ckpt_or_model: TensorsLike,
    baseline: TensorsLike | None = None,
    names: Renaming | None = None,
    *,
    prefix: str | None = None,
    root: str | None = None,
    exact: bool = False,
    allow_widened: bool | None = None,
    progress: Progress | None = None,
) -> Report:
    """Prove that every frozen tensor has the bits that the manifest records.

    Args:
        manifest: What must hold.
        ckpt_or_model: What came back from training.
        baseline: The published tensors; with them the report says where tensors differ, and by how much.
        names: From the trained names to the manifest's, where they differ: a mapping or a function.
        prefix: Taken off the trained names.
        root: The manifest's root or frozen root, if it is pinned.
        exact: Whether tensors that the manifest lacks, and trainable ones that are missing, count.
        allow_widened: Whether a tensor in a wider dtype with the same values is accepted; None accepts it in a live
            model and not in a file.
        progress: Called with the bytes read and the bytes in all.

    Raises:
        ManifestError: if the manifest is not valid, or nothing in it is frozen.
        UsageError: if the root is not the manifest's, or names do not fit.
        CheckpointError: if the checkpoint is malformed.
    """
    document = _manifest(manifest)
    if root is not None:
        verifying.check_root(document, root)
    with _source(ckpt_or_model) as trained, ExitStack() as stack:
        before = stack.enter_context(_source(baseline)) if baseline is not None else None
        widened = not isinstance(trained, Checkpoint) if allow_widened is None else allow_widened
        return verifying.verify(
            document,
            trained,
            baseline=before,
            names=names,
            prefix=prefix,
            exact=exact,
            allow_widened=widened,
            progress=progress,
        )


def write_manifest(manifest: Manifest, path: PathLike, *, overwrite: bool = False) -> None:
    """Publish a manifest by itself.

    Raises:
        UsageError: if the path exists and is not to be overwritten.
    """
    target = Path(path)
    if target.exists() and not overwrite:
        raise UsageError(f"{shown(target)}: exists already", hint="--overwrite replaces it")
    rewriting.write_manifest(manifest, target, overwrite=overwrite)


def load_names(path: PathLike) -> dict[str, str]:
    """Read a map from trained names to the manifest's, YAML or JSON.

    Raises:
        DocumentError: if it does not map text to text.
    """
    text = read_text(Path(path), DocumentError)
    if not isinstance(text.data, dict) or not all(
        isinstance(key, str) and isinstance(value, str) for key, value in text.data.items()
    ):
        raise DocumentError(text.label, [Problem("", "expected a map from the trained names to the manifest's")])
    return text.data


def schema(document: str) -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of a document: ``spec``, ``plan``, ``manifest`` or ``report``."""
    kinds: dict[str, type[Document]] = {"spec": Spec, "plan": Plan, "manifest": Manifest, "report": Report}
    name = kinds[document].__name__.lower()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "$id": f"urn:ckptsurg:{name}:1"} | kinds[
        document
    ].model_json_schema()


def diff(a: TensorsLike, b: TensorsLike, *, progress: Progress | None = None) -> DiffReport:
    """Compare two checkpoints, models or state dicts, tensor by tensor, bit by bit."""
    with _source(a) as one, _source(b) as other:
        return verifying.diff(one, other, progress=progress)


def freeze(
    model: torch.nn.Module,
    manifest: ManifestLike,
    names: Renaming | None = None,
    extra: Literal["keep", "error"] = "keep",
    *,
    allow_widened: bool = False,
) -> FrozenModel:
    """Make a live model obey a manifest; see ``ckptsurg.integrations.pytorch.freeze``."""
    from .integrations import pytorch

    return pytorch.freeze(model, _manifest(manifest), names, extra, allow_widened=allow_widened)


# --- Paths or objects -------------------------------------------------------------------------------


def _spec(given: SpecLike, source: TensorSource) -> Spec:
    """A spec; where it is not valid, the patterns in it that match nothing in the source are reported too."""
    if isinstance(given, Spec):
        return given
    text = Text("spec", dict(given)) if isinstance(given, Mapping) else read_text(Path(given), SpecError)
    try:
        return Spec.from_text(text)
    except SpecError as error:
        raise SpecError(text.label, [*error.problems, *unmatched(text, source.tensors)]) from None


def _spec_or_patterns(given: SpecLike | Iterable[str | Mapping[str, Any]], source: TensorSource) -> Spec:
    """A text is a path if it has the ending of a document or is the name of a file; else it is a pattern."""
    if isinstance(given, str) and not given.endswith((".yaml", ".yml", ".json")) and not Path(given).is_file():
        return Spec.of_patterns(given)
    if isinstance(given, str | Path | Spec | Mapping):
        return _spec(given, source)
    return Spec.of_patterns(given)


def _manifest(given: ManifestLike) -> Manifest:
    return given if isinstance(given, Manifest) else load_manifest(given)


@contextmanager
def _checkpoint(given: PathLike | Checkpoint) -> Iterator[Checkpoint]:
    if isinstance(given, Checkpoint):
        yield given
    else:
        with open_checkpoint(given) as opened:
            yield opened


@contextmanager
def _source(given: TensorsLike) -> Iterator[TensorSource]:
    if isinstance(given, str | Path):
        with open_checkpoint(given) as opened:
            yield opened
        return
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(given, torch.nn.Module):
        from .integrations.pytorch import source_of

        yield source_of(given)
    elif torch is not None and isinstance(given, Mapping):
        from .integrations.torch_tensors import TorchTensors

        yield TorchTensors(given, "the state dict")
    elif hasattr(given, "tensors") and hasattr(given, "read"):
        yield cast("TensorSource", given)
    else:
        raise UsageError(f"expected a path, checkpoint, model or state dict, found {shown(type(given).__name__)}")


def _plan(spec: Spec, base: Checkpoint) -> tuple[Plan, bytes | None]:
    """The plan and the new config.json, with what is wrong in either reported together."""
    problems: list[Problem] = []
    config: tuple[bytes | None, list[str]] = (None, [])
    try:
        config = edited_config(spec, base.folder)
    except SpecError as error:
        problems += error.problems
    try:
        planned = planning.plan(spec, base)
    except SpecError as error:
        raise SpecError(spec.label, [*error.problems, *problems]) from None
    if problems:
        raise SpecError(spec.label, problems)
    return planned.model_copy(update={"notes": (*planned.notes, *base.warnings, *config[1])}), config[0]


_UNITS = {"": 1, "B": 1, **{f"{p}B": 1000**n for n, p in enumerate("KMGT", 1)}}
_UNITS |= {f"{p}IB": 1024**n for n, p in enumerate("KMGT", 1)}


def _size(given: int | str | None) -> int | None:
    """Bytes in ``5GB`` (10^9) or ``5GiB`` (2^30)."""
    if given is None:
        return None
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)", str(given).strip())
    if match is None or match[2].upper() not in _UNITS:
        raise UsageError(f'"{shown(given)}" is no size; write 5GB, 500MB or a number of bytes')
    size = int(float(match[1]) * _UNITS[match[2].upper()])
    if size < 1:
        raise UsageError("the largest size of a shard must be at least one byte")
    return size


def _algorithm(given: str) -> str:
    if given not in ALGORITHMS:
        raise UsageError(f'unknown digest "{shown(given)}"; one of: {", ".join(ALGORITHMS)}')
    return given
