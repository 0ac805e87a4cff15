"""Names under which wrappers and trainers save the same tensor."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import TypeAlias

from .errors import UsageError
from .wording import enumerate_names, shown

__all__ = ["Renaming", "align", "common_prefix", "renamed", "unwrapped"]

#: From a name in the trained checkpoint or live model to one in the manifest.
Renaming: TypeAlias = Mapping[str, str] | Callable[[str], str]

#: Segments that wrappers add, wherever they stand.
_WRAPPERS = frozenset(
    ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "base_layer", "token_adapter")
)


def unwrapped(name: str) -> str:
    """A name without what DDP, torch.compile, FSDP, activation checkpointing and PEFT add to it.

    PEFT trains a copy of a whole module (``modules_to_save.default.``), which stands for the module; what it put aside
    (``original_module.``) keeps its name, and so stands for nothing.
    """
    segments = [segment for segment in name.split(".") if segment not in _WRAPPERS]
    if "modules_to_save" in segments[:-2]:
        place = segments.index("modules_to_save")
        del segments[place : place + 2]
    if segments[:2] == ["base_model", "model"]:
        segments = segments[2:]
    return ".".join(segments)


def renamed(given: Iterable[str], names: Renaming | None = None, prefix: str | None = None) -> dict[str, str]:
    """What each given name is called after the map and the prefix.

    Args:
        given: Names of a trained checkpoint or live model.
        names: From these to the manifest's, where they differ.
        prefix: Taken off each name, under what wrappers add.

    Raises:
        UsageError: if no key of the map is a given name, or two names become one.
    """
    listed = list(given)
    if isinstance(names, Mapping):
        if not any(name in names for name in listed):
            raise UsageError(
                "names: no key of the map is a tensor here; it maps the trained names to the manifest's: "
                f"{enumerate_names(names, 2)}"
            )
        new = {name: names.get(name, name) for name in listed}
    elif names is None or callable(names):
        new = {name: names(name) if names is not None else name for name in listed}
    else:
        raise UsageError(f"names: expected a mapping or a function, found {shown(type(names).__name__)}")
    for name, called in new.items():
        if type(called) is not str:
            raise UsageError(f'names: "{shown(name)}" becomes {shown(called, 40)}, which is no name')
    if prefix:
        new = {name: _without(prefix, called) for name, called in new.items()}
    owners: dict[str, list[str]] = defaultdict(list)
    for name, called in new.items():
        owners[called].append(name)
    if clash := next((group for group in owners.values() if len(group) > 1), None):
        raise UsageError(f'{enumerate_names(clash)} would all be called "{shown(new[clash[0]])}"')
    return new


def _without(prefix: str, name: str) -> str:
    if not name.startswith(prefix) and unwrapped(name).startswith(prefix):
        name = unwrapped(name)
    return name.removeprefix(prefix)


def align(wanted: Iterable[str], called: Mapping[str, str]) -> dict[str, str]:
    """Which given name stands for each wanted one: the same name first, else the same but for wrappers.

    Args:
        wanted: Names of a manifest.
        called: From given names to what they are called (``renamed``).

    Returns:
        Given names by wanted name; names without a partner are left out.

    Raises:
        UsageError: if two given names stand for one wanted name.
    """
    aligned: dict[str, str] = {}
    given_by_name = {new: name for name, new in called.items()}
    rest: list[str] = []
    for name in wanted:
        if name in given_by_name:
            aligned[name] = given_by_name.pop(name)
        else:
            rest.append(name)
    if not rest:
        return aligned
    by_bare: dict[str, list[str]] = defaultdict(list)
    for new, name in given_by_name.items():
        by_bare[unwrapped(new)].append(name)
    for name in rest:
        found = by_bare.get(unwrapped(name), [])
        if len(found) > 1:
            raise UsageError(f'{enumerate_names(found)} could all be "{shown(name)}"; give a map of names')
        if found:
            aligned[name] = found.pop()  # one tensor proves one other
    return aligned


def common_prefix(wanted: Sequence[Collection[str]], given: Iterable[str]) -> str | None:
    """The prefix under which one of each set of wanted names is given, wrappers aside; None where there is none."""
    names = {unwrapped(name) for name in given}
    if not wanted:
        return None
    prefixes = {name.removesuffix(one) for one in wanted[0] for name in names if name.endswith(one) and name != one}
    return next((p for p in sorted(prefixes) if all(any(p + name in names for name in one) for one in wanted)), None)
