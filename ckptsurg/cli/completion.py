"""What a shell offers where a pattern is due: the names of the checkpoint that the line has already, level by level.

Only headers of safetensors and manifests are read, and no framework is imported, for whoever presses a key waits. What
is wrong with a file is not said here: nothing is offered then, and the command itself will tell.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

__all__ = ["complete_names", "complete_names_of_manifest"]

#: What a shell leaves as it is: a name goes to the command line unquoted.
_HARMLESS = re.compile(r"[\w@%+,/.-]+")
_SEPARATOR = re.compile(r"[./]")
#: Of what is offered.
_MOST = 1000
#: Of a document and of a header, in bytes: a larger one takes too long to read.
_LARGEST = 64 << 20


def complete_names(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem[str]]:
    """Names in the checkpoint that is the argument CKPT."""
    return _offered(_names_in(_argument(context, "ckpt")), incomplete)


def complete_names_of_manifest(
    context: click.Context, parameter: click.Parameter, incomplete: str
) -> list[CompletionItem[str]]:
    """Names in the manifest that is the argument MANIFEST, or that stands by it; else in CKPT."""
    names = _names_in_manifest(_argument(context, "manifest")) or _names_in(_argument(context, "ckpt"))
    return _offered(names, incomplete)


def _argument(context: click.Context, name: str) -> Any:
    """What the line has for an argument. Where an option still waits for its value, click has not told them apart."""
    if (given := context.params.get(name)) is not None:
        return given
    arguments = [one.name for one in context.command.params if isinstance(one, click.Argument)]
    return dict(zip(arguments, context.args, strict=False)).get(name)


def _offered(names: Iterable[str], incomplete: str) -> list[CompletionItem[str]]:
    """How a pattern may go on: a level of modules and tensors; where it is one module alone, what is in it too.

    A shell puts a space after a word that can go on in one way only. A module is a pattern already, so it is offered
    without the separator, and never alone.
    """
    sign = "!" if incomplete.startswith("!") else ""
    typed = incomplete.removeprefix("!")
    below = [name for name in names if name.startswith(typed)]
    found = _level(below, typed)
    if len(found) == 1 and (inside := [name for name in below if len(name) > len(found[0])]):
        found += _level(inside, inside[0][: len(found[0]) + 1])
    harmless = [one for one in found if _HARMLESS.fullmatch(one) and not one.startswith("-")]
    return [CompletionItem(f"{sign}{one}") for one in harmless[:_MOST]]


def _level(names: Iterable[str], typed: str) -> list[str]:
    """What is typed, gone on with to the end of a segment."""
    found = set()
    for name in names:
        if name.startswith(typed):
            end = _SEPARATOR.search(name, len(typed))
            found.add(name if end is None else name[: end.start()])
    return sorted(found - {""}, key=_by_number)


def _by_number(name: str) -> list[tuple[int, str]]:
    """By this block 2 comes before block 10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"([0-9]+)", name)]


def _names_in(given: Any) -> list[str]:
    """The names in a checkpoint of safetensors."""
    path = _path(given)
    if path is None:
        return []
    with suppress(Exception):  # whatever is wrong with it, a key was pressed and no command given
        from ..formats.endings import SAFETENSORS
        from ..formats.folder import holds_safetensors, open_folder, open_index
        from ..formats.safetensors import open_single

        if path.is_dir():
            opened = open_folder(path) if holds_safetensors(path) else None
        elif path.name.endswith(".safetensors.index.json"):
            opened = open_index(path)
        else:
            opened = open_single(path) if path.name.endswith(SAFETENSORS) else None
        if opened is not None:
            with opened:
                return list(opened.tensors)
    return []


def _names_in_manifest(given: Any) -> list[str]:
    """The names in a manifest, which is not checked here."""
    path = _path(given)
    if path is None:
        return []
    with suppress(Exception):  # likewise
        import json

        if path.is_dir():
            path = path / "freeze.json"
        elif path.suffix != ".json":
            path = path.with_suffix(".freeze.json")
        if path.is_file() and path.stat().st_size <= _LARGEST:
            return list(json.loads(path.read_bytes())["tensors"])
    return []


def _path(given: Any) -> Path | None:
    """A path as the shell would expand it, which it has not done yet."""
    with suppress(Exception):  # no such user
        path = Path(os.path.expandvars(given)).expanduser()
        return path if path.is_dir() or path.is_file() else None
    return None
