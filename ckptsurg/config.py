"""Edits to a folder's config.json."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .checkpoints import read_small
from .containment import contained
from .errors import CheckpointError, Problem, SpecError, SystemFailure, UsageError
from .parsing import parse_json
from .spec import Spec
from .wording import closest, shown

__all__ = ["CONFIG_NAME", "Configs", "edited_config", "read_config"]

CONFIG_NAME = "config.json"
MAX_CONFIG_BYTES = 10_000_000


@dataclass(frozen=True, slots=True)
class Configs:
    """A folder's config.json.

    Attributes:
        before: As it is; None where there is none, or none that can be read.
        after: With the edits.
        notes: Edits that are likely not meant.
        is_edited: Whether there are any.
    """

    before: Mapping[str, Any] | None
    after: Mapping[str, Any] | None
    notes: Sequence[str] = ()
    is_edited: bool = False

    @property
    def content(self) -> bytes | None:
        """What is published; None where nothing is edited."""
        if not self.is_edited:
            return None
        return json.dumps(self.after, indent=2, ensure_ascii=False).encode() + b"\n"


def edited_config(spec: Spec, folder: Path | None) -> Configs:
    """The folder's config.json, and what the spec's edits make of it.

    Args:
        spec: The spec.
        folder: The base's folder; None for a lone file.

    Raises:
        SpecError: if there is none to be edited, or a path leads through something that is no object.
        CheckpointError: if one that is to be edited is malformed.
    """
    if spec.config is None or not (spec.config.set or spec.config.unset):
        return _unedited(folder)
    if folder is None:
        message = "the base is a lone file and has no config.json; give the folder of the model, or leave `config` out"
        raise SpecError(spec.label, [spec.problem(("config",), message)])
    before = read_config(folder)
    if before is None:
        message = f"{shown(folder)} has no config.json to edit"
        raise SpecError(spec.label, [spec.problem(("config",), message)])
    config = copy.deepcopy(before)
    problems: list[Problem] = []
    notes: list[str] = []
    for path in spec.config.set:
        if (whole := next((one for one in _above(path) if one in spec.config.set), None)) is not None:
            problems.append(spec.problem(("config", "set", path), f"{shown(whole)} is set too, as a whole"))
    for position, path in enumerate(spec.config.unset):
        parent, key = _parent(config, path, create=False)
        if parent is None or key not in parent:
            notes += _near_miss("unset", path, config)
        else:
            del parent[key]
        if path in spec.config.set:
            problems.append(spec.problem(("config", "unset", position), f"{shown(path)} is set and unset"))
    for path, value in spec.config.set.items():
        notes += [] if path in config or "." in path else _near_miss("set", path, config)
        parent, key = _parent(config, path, create=True)
        if parent is None:
            problems.append(spec.problem(("config", "set", path), f"{shown(path)}: a part of the path is no object"))
        else:
            parent[key] = value
    if problems:
        raise SpecError(spec.label, problems)
    return Configs(before, config, notes, is_edited=True)


def _unedited(folder: Path | None) -> Configs:
    try:
        config = None if folder is None else read_config(folder)
    except (CheckpointError, SystemFailure):
        config = None  # where it is to be brought along, it is refused then
    return Configs(config, config)


def _above(path: str) -> Iterator[str]:
    """``a.b`` and ``a`` for ``a.b.c``."""
    while "." in path:
        path = path.rpartition(".")[0]
        yield path


def read_config(folder: Path) -> dict[str, Any] | None:
    """The config.json of a folder; None where there is none.

    Raises:
        CheckpointError: if it is malformed, or a link that leaves the folder.
        SystemFailure: if it cannot be read.
    """
    path = folder / CONFIG_NAME
    try:
        raw = read_small(contained(path, folder), MAX_CONFIG_BYTES, os.O_NOFOLLOW)
    except UsageError:  # there is none
        return None
    try:
        config = parse_json(raw.decode("utf-8"))
    except ValueError as failure:
        raise CheckpointError(f"{shown(path)}: malformed: {shown(failure)}") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{shown(path)}: expected an object")
    return config


def _near_miss(edit: str, path: str, config: dict[str, Any]) -> list[str]:
    """A key that config.json lacks is no error, but one that looks like a key it has is likely a slip."""
    near = closest(path, config, 1, 0.8)
    return [f"config.{edit}: config.json has no {shown(path)}, but {shown(near[0])}"] if near else []


def _parent(config: dict[str, Any], path: str, *, create: bool) -> tuple[dict[str, Any] | None, str]:
    """The object that a dotted path ends in, and the last key; None where there is no such object."""
    if path in config:
        return config, path
    *parents, key = path.split(".")
    place: Any = config
    for part in parents:
        if create and isinstance(place, dict):
            place = place.setdefault(part, {})
        else:
            place = place.get(part) if isinstance(place, dict) else None
    return (place if isinstance(place, dict) else None), key
