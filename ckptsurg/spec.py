"""The spec: the document in which a person says what becomes of each tensor of a checkpoint."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeAlias

from pydantic import AfterValidator, BeforeValidator, Field, PrivateAttr, WithJsonSchema

from .documents import Document, Model, canonical_json, fail, is_none, suggest
from .errors import Problem, SpecError
from .initializer_arguments import Init
from .parsing import Place, Text, describe_place
from .tensors import DTYPE_BITS, MAX_RANK, digest_of
from .wording import quoted, shown

__all__ = [
    "AddRule",
    "ConfigEdits",
    "FreezeItem",
    "Item",
    "ReinitRule",
    "Spec",
    "Where",
    "load_spec",
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


Selector: TypeAlias = Annotated[
    tuple[Item, ...], BeforeValidator(_items, json_schema_input_type=str | Item | list[str | Item])
]
FreezeSelector: TypeAlias = Annotated[
    tuple[FreezeItem, ...], BeforeValidator(_items, json_schema_input_type=str | FreezeItem | list[str | FreezeItem])
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


class ConfigEdits(Model):
    """Edits to the folder's config.json.

    Attributes:
        set: Values by dotted path.
        unset: Dotted paths to remove.
    """

    set: dict[str, Any] = Field(default_factory=dict)
    unset: tuple[str, ...] = ()


class Spec(Document):
    """What becomes of each tensor of a base. A spec has no order: each tensor gets one fate.

    Attributes:
        name: What the spec is called.
        seed: Seed of all drawn values.
        drop: Tensors that the output does not have.
        freeze: Tensors that training must not change; all else trains.
        train: Tensors that training changes; all else is frozen.
        reinit: Tensors to draw anew.
        add: Tensors that the base does not have.
        config: Edits to config.json.
    """

    error = SpecError
    nullable = frozenset(("name",))

    version: Literal[1] = Field(description="Version of this document's form.")
    name: str | None = None
    seed: Annotated[int, Field(ge=0, lt=2**64)] = 0
    drop: Selector | None = None
    freeze: FreezeSelector | None = None
    train: Selector | None = None
    reinit: tuple[ReinitRule, ...] = ()
    add: tuple[AddRule, ...] = ()
    config: ConfigEdits | None = None

    _text: Text = PrivateAttr(default_factory=lambda: Text("spec", None))

    @classmethod
    def from_text(cls, text: Text) -> Self:
        spec = super().from_text(text)
        spec._text = text
        return spec

    @classmethod
    def repaired(cls, text: Text) -> Self | None:
        """What is left of a spec that is not valid, without the parts that are not; None if that is not valid either.

        It is good for one thing: to find what else is wrong with the spec, so that all is reported at once.
        """
        data = copy.deepcopy(text.data)
        for _ in range(3):  # what is taken out may leave a rule without a key that it needs
            try:
                spec = cls.from_text(Text(text.label, data))
            except SpecError as error:
                if not isinstance(data, dict) or any(not problem.place for problem in error.problems):
                    return None
                for problem in error.problems:
                    _neutralise(data, problem.place)
                data["version"] = 1
            else:
                spec._text = text
                return spec
        return None

    @classmethod
    def of_patterns(cls, freeze: str | Iterable[Any]) -> Self:
        """The spec that only freezes."""
        selector = freeze if isinstance(freeze, str) else list(freeze)
        return cls.from_text(Text("patterns", {"version": 1, "freeze": selector}))

    @property
    def label(self) -> str:
        return self._text.label

    def digest(self, algorithm: str = "blake3") -> str:
        """Digest of the validated spec as canonical JSON: how it was written does not matter."""
        return digest_of([canonical_json(self.model_dump(mode="json"))], algorithm)

    def problem(self, place: Place, message: str) -> Problem:
        """A problem at a place of the document as the user wrote it."""
        return Problem(self.written(place), message, self._text.line(place), self._text.nearest(place))

    def written(self, place: Place) -> str:
        """The path of a place: ``freeze`` where the user wrote one pattern, ``freeze[1]`` in a list."""
        return describe_place(self._text.nearest(place))

    def pattern_at(self, written: str) -> str:
        """The pattern, or name of an added tensor, of the rule at a path such as ``freeze[1]``; empty for none."""
        rules: dict[str, str] = {}
        for key in ("drop", "freeze", "train", "reinit"):
            for position, item in enumerate(getattr(self, key) or ()):
                rules[self.written((key, position))] = item.match
        rules |= {self.written(("add", position)): rule.name for position, rule in enumerate(self.add)}
        return rules.get(written, "")


#: Rules that do nothing, to stand in for rules that are not valid.
_IDLE_ITEM = {"match": r"re:[^\x00-\x{10FFFF}]", "optional": True}
_IDLE_RULES: dict[str, dict[str, Any]] = {
    "reinit": {**_IDLE_ITEM, "init": "zeros"},
    "add": {"name": "\x00", "shape": [], "dtype": "F32", "init": "zeros"},
}


def _neutralise(data: dict[str, Any], place: Place) -> None:
    """Take out what is wrong at a place, and as little else as possible."""
    key, *rest = place
    if key not in data:
        return
    if not isinstance(data[key], list) or not rest or not isinstance(rest[0], int):
        del data[key]
        return
    rules: list[Any] = data[key]
    position, inside = rest[0], rest[1:]
    rule = rules[position]
    if isinstance(rule, dict) and inside and inside[0] in rule and inside[0] not in ("match", "name", "shape", "dtype"):
        if inside[0] == "init":
            rule["init"] = "zeros"
        else:
            del rule[inside[0]]
    else:
        rules[position] = _IDLE_RULES.get(str(key), _IDLE_ITEM)


def load_spec(path: str | Path) -> Spec:
    """Read a spec, YAML or (where the name ends in ``.json``) JSON.

    Raises:
        SpecError: with every problem at once, each with its line and path.
        UsageError: if there is no such file.
    """
    from .texts import read_text  # here, for YAML's own import costs as much as a small spec

    return Spec.from_text(read_text(Path(path), SpecError))
