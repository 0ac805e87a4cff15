"""Names under which wrappers and trainers save the same tensor."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import TypeAlias

from .errors import UsageError, enumerate_names, shown

__all__ = ["Renaming", "align", "common_prefix", "renamer", "unwrapped"]

#: From a name in the trained checkpoint or live model to one in the manifest.
Renaming: TypeAlias = Mapping[str, str] | Callable[[str], str]

#: Segments that wrappers add, wherever they stand.
_WRAPPERS = frozenset(("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "base_layer"))


def unwrapped(name: str) -> str:
    """A name without what DDP, torch.compile, FSDP, activation checkpointing and PEFT add to it."""
    segments = [segment for segment in name.split(".") if segment not in _WRAPPERS]
    if segments[:2] == ["base_model", "model"]:
        segments = segments[2:]
    return ".".join(segments)


def renamer(names: Renaming | None, prefix: str | None, given: Iterable[str]) -> dict[str, str]:
    """What each given name is called after the map and the prefix.

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
        renamed = {name: names.get(name, name) for name in listed}
    else:
        renamed = {name: names(name) if names is not None else name for name in listed}
    if prefix:
        renamed = {name: new.removeprefix(prefix) for name, new in renamed.items()}
    owners: dict[str, list[str]] = defaultdict(list)
    for name, new in renamed.items():
        owners[new].append(name)
    if clash := next((group for group in owners.values() if len(group) > 1), None):
        raise UsageError(f'{enumerate_names(clash)} would all be called "{shown(renamed[clash[0]])}"')
    return renamed


def align(wanted: Iterable[str], renamed: Mapping[str, str]) -> dict[str, str]:
    """Which given name stands for each wanted one: the same name first, else the same but for wrappers.

    Args:
        wanted: Names of a manifest.
        renamed: From given names to what they are called (``renamer``).

    Returns:
        Given names by wanted name; names without a partner are left out.

    Raises:
        UsageError: if two given names stand for one wanted name.
    """
    aligned: dict[str, str] = {}
    given_by_name = {new: name for name, new in renamed.items()}
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
            aligned[name] = found[0]
    return aligned


def common_prefix(wanted: Iterable[str], given: Iterable[str]) -> str | None:
    """The prefix under which all wanted names are given; None where there is none."""
    names = set(given)
    listed = list(wanted)
    if not listed:
        return None
    first = listed[0]
    prefixes = [name.removesuffix(first) for name in names if name.endswith(first) and name != first]
    return next((prefix for prefix in sorted(prefixes) if all(prefix + name in names for name in listed)), None)
