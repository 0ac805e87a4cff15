"""A spec drafted from a checkpoint: commented YAML, with examples that fit these tensors.

The draft is planned before anybody sees it, and so is the draft with each example: one that does not fit is left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import yaml

from ..errors import SpecError, UsageError
from ..parsing import Text
from ..planning import plan
from ..selectors import selected_names
from ..spec import Spec
from ..tensors import TensorSource
from ..wording import shown
from .commented import Entry, rendered
from .entries import entries_of
from .subject import Subject

__all__ = ["SCHEMA_NAME", "draft"]

#: Of the JSON Schema that a draft names, beside it.
SCHEMA_NAME = "ckptsurg-spec.schema.json"


def draft(
    source: TensorSource,
    config: Mapping[str, Any] | None = None,
    *,
    freeze_all_but: Sequence[str] = (),
    new_head: int | None = None,
    head: str | None = None,
    name: str | None = None,
    schema: str = SCHEMA_NAME,
) -> str:
    """A spec for a checkpoint, as commented YAML. Nothing is read but names, dtypes and shapes.

    Args:
        source: The checkpoint.
        config: Its config.json; None where it has none.
        freeze_all_but: Patterns of what trains; without any it is the head.
        new_head: How many outputs the head gets, which is drawn anew; None leaves it as it is.
        head: A pattern of the head's tensors; None to have it told from names and shapes.
        name: What the spec is called.
        schema: Path from the spec, or address, of the JSON Schema by which an editor completes it.

    Raises:
        SpecError: if a pattern cannot be read or selects nothing.
        UsageError: if the head cannot be told or is no layer like Linear, or a number or pattern is no good.
    """
    if new_head is not None and (type(new_head) is not int or new_head < 1):
        raise UsageError(f"the new head needs a number of outputs from 1, found {shown(new_head, 40)}")
    for pattern in (*freeze_all_but, *([head] if head is not None else [])):
        if pattern.startswith("!"):
            raise UsageError(f'"{shown(pattern)}": give what trains, without !')
        selected_names(source.tensors, [pattern], getattr(source, "metadata", None))
    subject = Subject(source, config, freeze_all_but, new_head, head)
    return rendered(_checked(entries_of(subject, name, schema), source))


def _checked(entries: Sequence[Entry], source: TensorSource) -> list[Entry]:
    """The entries, without examples that do not fit the source.

    Raises:
        SpecError: if the draft itself does not.
    """
    _plan(rendered(entries), source)
    return [one for entry in entries if (one := _fitting(entry, entries, source)) is not None]


def _fitting(entry: Entry, entries: Sequence[Entry], source: TensorSource) -> Entry | None:
    if isinstance(entry, str):
        return entry
    # Items of a list that take away one after another take away at least as much each by itself.
    if len(entry.parts) > 1 and _fits(rendered(entries, entry.parts), source):
        return entry
    fitting = [part for part in entry.parts if _fits(rendered(entries, [part]), source)]
    return replace(entry, parts=fitting) if fitting else None


def _fits(text: str, source: TensorSource) -> bool:
    try:
        _plan(text, source)
    except SpecError:
        return False
    return True


def _plan(text: str, source: TensorSource) -> None:
    plan(Spec.from_text(Text("draft", yaml.safe_load(text))), source)
