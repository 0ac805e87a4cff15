"""The public functions on drafts of a spec: a checkpoint in, a draft out, or published with its schema beside."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .coercing import PathLike, TensorsLike, as_patterns, as_target, checkpoint_of
from .errors import CkptsurgError, SpecError, UsageError
from .wording import shown

if TYPE_CHECKING:
    from .checkpoints import Checkpoint

__all__ = ["draft_spec", "name_of", "place_for_draft"]

#: In bytes; some fifty times what it has.
_MOST_OF_A_SCHEMA = 1 << 20


def draft_spec(
    ckpt: TensorsLike,
    *,
    freeze_all_but: str | Sequence[str] = (),
    new_head: int | None = None,
    head: str | None = None,
    name: str | None = None,
    schema: str | None = None,
) -> str:
    """A spec for a checkpoint to begin with, as commented YAML. Of safetensors only headers are read.

    It is a valid spec for this checkpoint, and so is it with any of its examples.

    Args:
        ckpt: The checkpoint.
        freeze_all_but: Patterns of what trains; without any it is the head.
        new_head: How many outputs the head gets, which is drawn anew; None leaves it as it is.
        head: A pattern of the head's tensors; None to have it told from names and shapes.
        name: What the spec is called; None calls it after the checkpoint.
        schema: Path from the spec, or address, of the JSON Schema by which an editor completes it; None names the one
            that ``ckptsurg init -o`` writes beside it.

    Raises:
        SpecError: if a pattern cannot be read or selects nothing.
        UsageError: if there is no checkpoint at the path, the head cannot be told or is no layer like Linear, or a
            number or pattern is no good.
        CheckpointError: if the checkpoint or its config.json is malformed.
        SystemFailure: if it cannot be read.
    """
    from .drafting import SCHEMA_NAME, draft

    with checkpoint_of(ckpt) as opened:
        called = name if name is not None or opened.path is None else name_of(opened.path)
        return draft(
            opened,
            _config_of(opened),
            freeze_all_but=as_patterns(freeze_all_but) if freeze_all_but else (),
            new_head=new_head,
            head=head,
            name=called,
            schema=SCHEMA_NAME if schema is None else schema,
        )


def name_of(path: Path) -> str:
    """What a spec for the checkpoint at a path is called: as the file, or as the folder of a model."""
    path = path.absolute()
    if re.match(r"(?:model|pytorch_model|checkpoint)\b", path.name):
        path = path.parent
    if path.parent.name == "snapshots":  # of a cache of Hugging Face: models--owner--model/snapshots/<commit>
        return path.parent.parent.name.rpartition("--")[2]
    return re.sub(r"(?:\.(?:safetensors|weights|keras|h5|pth?|bin|ckpt|index|json))+$", "", path.name) or "draft"


def _config_of(checkpoint: Checkpoint) -> Mapping[str, Any] | None:
    from .config import read_config

    return None if checkpoint.folder is None else read_config(checkpoint.folder)


def place_for_draft(
    path: PathLike, *, overwrite: bool = False, with_schema: bool = True
) -> Callable[[str], Sequence[Path]]:
    """Where a draft may be published, refused before any work is done for it.

    Args:
        path: The place.
        overwrite: Whether to replace an earlier spec.
        with_schema: Whether the schema is published in the same folder, under the name that drafts give it. One that
            is there already, by whichever version of ckptsurg, is replaced.

    Returns:
        What publishes a draft, and answers with the paths of what it wrote.

    Raises:
        UsageError: if something is there that is not to be replaced, or the name is that of a JSON document.
    """
    from .drafting import SCHEMA_NAME
    from .publishing import publish_document
    from .schemas import schema

    target = as_target(path)
    if target.suffix == ".json":
        raise UsageError(f"{shown(target)}: a draft is YAML, for its comments; end the name in .yaml")
    if os.path.lexists(target) and not overwrite:
        hint = "--overwrite (overwrite=True) replaces an earlier spec"
        raise UsageError(f"{shown(target)}: exists already", hint=hint)
    if os.path.lexists(target) and not _is_spec(target):
        raise UsageError(f"{shown(target)}: is no spec and is not replaced; choose another place")
    beside = target.parent / SCHEMA_NAME
    if with_schema and os.path.lexists(beside) and not _is_schema(beside):
        hint = "--schema names another, and writes none"
        raise UsageError(f"{shown(beside)}: is no schema of ckptsurg and is not replaced", hint=hint)

    def publish(draft: str) -> Sequence[Path]:
        if with_schema:
            text = json.dumps(schema("spec"), indent=2).encode() + b"\n"
            if not beside.exists() or beside.read_bytes() != text:
                publish_document(text, beside, overwrite=True)
        publish_document(draft.encode(), target, overwrite=overwrite)
        return [target, beside] if with_schema else [target]

    return publish


def _is_spec(path: Path) -> bool:
    from .spec import Spec, read_spec

    if path.is_symlink() or not path.is_file():
        return False
    try:
        written = read_spec(path).data
    except CkptsurgError:
        return False
    return isinstance(written, dict) and "version" in written and written.keys() <= Spec.model_fields.keys()


def _is_schema(path: Path) -> bool:
    from .parsing import parse_json, read_bytes

    if path.is_symlink() or not path.is_file():
        return False
    try:
        written = parse_json(read_bytes(path, _MOST_OF_A_SCHEMA, SpecError).decode())
    except (CkptsurgError, ValueError):
        return False
    return isinstance(written, dict) and str(written.get("$id", "")).startswith("urn:ckptsurg:spec:")
