"""What a spec says of tensors: selectors, which are lists of patterns, and rules."""

from __future__ import annotations

import re
from typing import Annotated, TypeAlias

from pydantic import AfterValidator, BeforeValidator, Field, WithJsonSchema

from .documents import Model, fail, is_false, is_none, suggest
from .initializer_arguments import Init
from .tensors import DTYPE_BITS, MAX_RANK
from .wording import quoted, shown

__all__ = [
    "AddRule",
    "CastRule",
    "DropItem",
    "DropSelector",
    "FreezeItem",
    "FreezeSelector",
    "GraftRule",
    "Item",
    "ReinitRule",
    "RenameRule",
    "Selector",
    "Where",
]


def _known_dtype(value: str) -> str:
    if value not in DTYPE_BITS:
        raise fail(f'"{shown(value)}" is not known' + suggest(value, list(DTYPE_BITS)))
    return value


Dtype: TypeAlias = Annotated[str, AfterValidator(_known_dtype), WithJsonSchema({"enum": list(DTYPE_BITS)})]
Size = Annotated[int, Field(ge=0, lt=2**63)]


# --- Selectors --------------------------------------------------------------------------------------


class Where(Model):
    """What else a selected tensor must be.

    Attributes:
        dtype: Its dtype, as the file spells it.
        ndim: Its number of dimensions.
        beside: The name of a sibling that it must have, such as ``running_mean``.
    """

    dtype: Dtype | None = None
    ndim: Annotated[int, Field(ge=0)] | None = None
    beside: Annotated[str, Field(min_length=1)] | None = None


class Item(Model):
    """One pattern and what is expected of it.

    Attributes:
        match: The pattern; with a leading ``!`` it takes away.
        where: Filters what the pattern matched.
        expect: How many tensors the item selects or takes away, exactly.
        optional: Whether it may match nothing.
    """

    match: Annotated[str, Field(min_length=1)]
    where: Where | None = None
    expect: Annotated[int, Field(ge=0)] | None = None
    optional: bool = False


def _items(value: object) -> object:
    """A pattern, a list or an object, written out as a list of objects."""
    listed = value if isinstance(value, list | tuple) else [value]
    if not listed:
        raise fail("an empty list selects nothing; leave the key out")
    return tuple({"match": item} if isinstance(item, str) else item for item in listed)


def _rows(value: object) -> object:
    if not isinstance(value, str) or not re.fullmatch(
        r"\[(?:-?[0-9]{1,18}|(?:-?[0-9]{1,18})?:(?:-?[0-9]{1,18})?)\]", value
    ):
        raise fail(f'expected a range of rows in quotes, such as "[:32000]", found {quoted(value, 40)}')
    return value


class FreezeItem(Item):
    """A pattern of `freeze`.

    Attributes:
        rows: Which part along the first dimension is frozen, as a Python slice without a step: ``[:32000]``; the rest
            of the tensor trains. None freezes the whole tensor.
    """

    rows: Annotated[str, BeforeValidator(_rows)] | None = Field(default=None, exclude_if=is_none)


class DropItem(Item):
    """A pattern of `drop`.

    Attributes:
        renumber: Whether the numbered blocks that are left close the gaps: of ``layers.0`` to ``layers.3``, the second
            dropped, the last two become ``layers.1`` and ``layers.2``.
    """

    renumber: bool = Field(default=False, exclude_if=is_false)


Selector: TypeAlias = Annotated[
    tuple[Item, ...], BeforeValidator(_items, json_schema_input_type=str | Item | list[str | Item])
]
FreezeSelector: TypeAlias = Annotated[
    tuple[FreezeItem, ...], BeforeValidator(_items, json_schema_input_type=str | FreezeItem | list[str | FreezeItem])
]
DropSelector: TypeAlias = Annotated[
    tuple[DropItem, ...], BeforeValidator(_items, json_schema_input_type=str | DropItem | list[str | DropItem])
]


# --- Rules ------------------------------------------------------------------------------------------


def _sizes(value: object) -> object:
    """A whole list of sizes."""
    if not isinstance(value, list):
        return value
    if len(value) > MAX_RANK:
        raise fail(f"a tensor has at most {MAX_RANK} dimensions, found {len(value):,}")
    return tuple(value)


def _shape(value: object) -> object:
    """``{0: 10}``, ``{"0": 10}`` or a whole list; the keys of the first become numbers."""
    for size in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        if type(size) is not int or not 0 <= size < 2**63:
            raise fail(f"a size is a whole number from 0, found {quoted(size, 40)}")
    if isinstance(value, list):
        return _sizes(value)
    if not isinstance(value, dict):
        raise fail(f"expected new sizes, {{0: 10}} or a whole list, found {quoted(value, 40)}")
    sizes: dict[object, object] = {}
    for key, size in value.items():
        dimension = int(key) if isinstance(key, str) and re.fullmatch("-?[0-9]{1,9}", key) else key
        if not isinstance(dimension, int) or isinstance(dimension, bool):
            raise fail(f'a dimension is a whole number, found "{shown(key, 40)}"; write {{0: 10}}')
        if dimension in sizes:
            raise fail(f"the dimension {dimension} stands twice")
        sizes[dimension] = size
    return sizes


Shape: TypeAlias = Annotated[
    tuple[Size, ...] | dict[int, Size],
    BeforeValidator(_shape, json_schema_input_type=list[Size] | dict[str, Size]),
]


class ReinitRule(Item):
    """Tensors to draw anew.

    Attributes:
        shape: New sizes, by dimension or as a whole; None leaves the shape as it is.
        init: What to draw.
        keep: Whether the part that overlaps the old tensor keeps its bits.
        frozen: Whether the drawn tensor is frozen.
    """

    shape: Shape | None = None
    init: Init
    keep: bool = False
    frozen: bool = False


class AddRule(Model):
    """A tensor that the base does not have."""

    name: Annotated[str, Field(min_length=1)]
    shape: Annotated[tuple[Size, ...], BeforeValidator(_sizes, json_schema_input_type=list[Size])]
    dtype: Dtype
    init: Init
    frozen: bool = False


class CastRule(Item):
    """Tensors that get another dtype. Of several rules for one tensor the last wins.

    Attributes:
        dtype: The new dtype, one with fractions; tensors whose own has none stay as they are.
    """

    dtype: Dtype


class GraftRule(Item):
    """Tensors whose bytes come from another checkpoint.

    Attributes:
        donor: What the other checkpoint is called on the command line; ``from`` in the document.
        named: What the tensors are called there, as ``to`` of a `rename` rule has it; None for the same names.
    """

    donor: Annotated[str, Field(min_length=1, alias="from")]
    named: Annotated[str, Field(min_length=1)] | None = Field(default=None, exclude_if=is_none)


class RenameRule(Item):
    r"""Tensors, or modules, that are called otherwise in the output.

    Attributes:
        to: The new name. ``*``, ``?`` and ``**`` in it stand for what those of the pattern matched, in their order, a
            slice being one ``*``; after ``re:``, ``\1`` for what is between the first parentheses.
    """

    to: Annotated[str, Field(min_length=1)]
