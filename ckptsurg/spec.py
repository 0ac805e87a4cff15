"""The spec: the document in which a person says what becomes of each tensor of a checkpoint."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, PrivateAttr

from .documents import Document, Model, canonical_json, is_empty
from .errors import Problem, SpecError, UsageError
from .parsing import Place, Text, describe_place, known_document
from .rules import AddRule, CastRule, DropSelector, FreezeSelector, GraftRule, ReinitRule, RenameRule, Selector
from .tensors import digest_of
from .wording import closest, shown

__all__ = ["ConfigEdits", "Spec", "load_spec", "read_spec"]

_ENDINGS = (".yaml", ".yml", ".json")
#: In a folder that is given in the place of a spec.
_OF_CHECKPOINTS = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin")
#: Files of a folder among which one of a like name is looked for.
_MOST_FILES = 5000

#: The keys whose values are patterns, or rules that have one.
RULES = ("drop", "freeze", "train", "reinit", "cast", "graft", "rename")


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
        cast: Tensors that get another dtype.
        graft: Tensors whose bytes come from another checkpoint.
        rename: Tensors, or modules, that are called otherwise in the output.
        config: Edits to config.json.
    """

    error = SpecError
    nullable = frozenset(("name",))

    version: Literal[1] = Field(description="Version of this document's form.")
    name: str | None = None
    seed: Annotated[int, Field(ge=0, lt=2**64)] = 0
    drop: DropSelector | None = None
    freeze: FreezeSelector | None = None
    train: Selector | None = None
    reinit: tuple[ReinitRule, ...] = ()
    add: tuple[AddRule, ...] = ()
    cast: tuple[CastRule, ...] = Field(default=(), exclude_if=is_empty)
    graft: tuple[GraftRule, ...] = Field(default=(), exclude_if=is_empty)
    rename: tuple[RenameRule, ...] = Field(default=(), exclude_if=is_empty)
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

    @property
    def as_written(self) -> dict[str, Any]:
        """The document as JSON has it, its rules where the user wrote them."""
        written: dict[str, Any] = json.loads(self.to_json() if self._text.data is None else json.dumps(self._text.data))
        return written

    def digest(self, algorithm: str = "blake3") -> str:
        """Digest of the validated spec as canonical JSON: how it was written does not matter."""
        return digest_of([canonical_json(self.model_dump(mode="json", by_alias=True))], algorithm)

    def problem(self, place: Place, message: str) -> Problem:
        """A problem at a place of the document as the user wrote it."""
        return Problem(self.written(place), message, self._text.line(place), self._text.nearest(place))

    def written(self, place: Place) -> str:
        """The path of a place: ``freeze`` where the user wrote one pattern, ``freeze[1]`` in a list."""
        return describe_place(self._text.nearest(place))

    def place_of(self, written: str) -> Place:
        """The place of a path such as ``freeze[1]``; the document itself where there is no such rule."""
        for key in RULES:
            for position in range(len(getattr(self, key) or ())):
                if self.written((key, position)) == written:
                    return (key, position)
        return ()

    def pattern_at(self, written: str) -> str:
        """The pattern, or name of an added tensor, of the rule at a path such as ``freeze[1]``; empty for none."""
        rules: dict[str, str] = {}
        for key in RULES:
            for position, item in enumerate(getattr(self, key) or ()):
                rules[self.written((key, position))] = item.match
        rules |= {self.written(("add", position)): rule.name for position, rule in enumerate(self.add)}
        return rules.get(written, "")


#: Rules that do nothing, to stand in for rules that are not valid.
_IDLE_ITEM = {"match": r"re:[^\x00-\x{10FFFF}]", "optional": True}
_IDLE_RULES: dict[str, dict[str, Any]] = {
    "reinit": {**_IDLE_ITEM, "init": "zeros"},
    "cast": {**_IDLE_ITEM, "dtype": "F32"},
    "graft": {**_IDLE_ITEM, "from": "base"},
    "rename": {**_IDLE_ITEM, "to": "x"},
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
    return Spec.from_text(read_spec(Path(path)))


def read_spec(path: Path) -> Text:
    """The text of a spec, or of what is no other document at least.

    Raises:
        SpecError: if it is no document, or another one.
        UsageError: if there is no such file.
        SystemFailure: if it cannot be read.
    """
    from .texts import read_text  # here, for YAML's own import costs as much as a small spec

    _refuse_without_reading(path)
    text = read_text(path, SpecError)
    if (what := known_document(text.data)) is not None:
        raise SpecError(text.label, [Problem("", f"is {what}; expected a spec")])
    return text


def _refuse_without_reading(path: Path) -> None:
    """Say what stands in the place of a spec, or near it, where that is no file.

    Raises:
        UsageError: if there is no file; a folder that holds no checkpoint is left to whoever reads.
    """
    with suppress(OSError):
        if path.is_dir() and any(True for pattern in _OF_CHECKPOINTS for _ in path.glob(pattern)):
            raise UsageError(f"{shown(path)}: is the folder of a checkpoint; expected a spec")
        if not path.exists() and path.parent.is_dir():
            there = [one.name for one in islice(path.parent.iterdir(), _MOST_FILES)]
            if near := closest(path.name, [name for name in there if name.endswith(_ENDINGS)], limit=1, cutoff=0.8):
                raise UsageError(f"{shown(path)}: no such file; nearest: {shown(path.parent / near[0])}")
