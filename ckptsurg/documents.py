"""The documents that people write and programs exchange: strict, versioned models, and what is wrong in one."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from threading import RLock
from typing import Any, ClassVar, Literal, Self, get_args, get_type_hints

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails, PydanticCustomError
from typing_extensions import is_typeddict

from .errors import DocumentError, Problem
from .parsing import Place, Text, describe_place
from .wording import closest, counted, quoted, shown

__all__ = ["Document", "Model", "canonical_json", "fail", "is_empty", "is_false", "is_none", "may_lack", "suggest"]


_BUILDING = RLock()
#: That are told at once.
_MOST_PROBLEMS = 100


class Model(BaseModel):
    """A part of a document: nothing is converted, unknown keys are errors.

    Validators are built when a model is first used, which of most nobody does in a run.
    """

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        frozen=True,
        allow_inf_nan=False,
        defer_build=True,
        json_schema_serialization_defaults_required=True,
    )

    @classmethod
    def model_rebuild(cls, **options: Any) -> bool | None:
        """Build the validators, in one thread at a time, which pydantic sees to itself only since 2.14."""
        with _BUILDING:
            return super().model_rebuild(**options)


class Document(Model):
    """A whole document, with its version."""

    error: ClassVar[type[DocumentError]] = DocumentError
    #: Keys that may have no value.
    nullable: ClassVar[frozenset[str]] = frozenset()

    version: Literal[1] = 1

    @classmethod
    def from_text(cls, text: Text) -> Self:
        """Validate a parsed text.

        Raises:
            DocumentError: (of the document's own kind) with every problem found.
        """
        if not isinstance(text.data, dict):
            found = "nothing" if text.data is None else f"a {_kind(text.data)}"
            raise cls.error(text.label, [Problem("", f"expected keys and values at the top, found {found}", 1)])
        problems = [*_version_problems(text), *islice(_empty_keys(text, cls.nullable), _MOST_PROBLEMS)]
        data = {key: value for key, value in text.data.items() if value is not None} | {"version": 1}
        try:
            # As JSON, where a list may stand for a tuple, although nothing else is converted.
            document = cls.model_validate_json(json.dumps(data, allow_nan=False))
        except ValidationError as error:
            problems += _problems(cls, error, text)
        except RecursionError:
            problems.append(Problem("", "nested too deeply"))
        except (TypeError, ValueError) as error:
            circular = "Circular" in str(error)  # and without end
            problems += () if circular else _not_finite(text)
            problems = problems or [Problem("", f"holds what no document can: {shown(error)}")]
        if problems:
            raise cls.error(text.label, problems)
        return document

    def __eq__(self, other: object) -> bool:
        # Where a document was read from is no part of it.
        return type(self) is type(other) and self.__dict__ == other.__dict__

    __hash__ = None  # type: ignore[assignment]

    def to_json(self) -> str:
        """The document as JSON of printable ASCII characters alone, so that no name plays tricks on a terminal."""
        # A key that says nothing would be refused where the document is read again.
        silent = {key for key, value in self.__dict__.items() if value is None and key not in self.nullable}
        text = self.model_dump_json(by_alias=True, indent=1, ensure_ascii=True, exclude=silent)
        return text.replace("\x7f", "\\u007f")  # which pydantic takes for printable


def is_none(value: object) -> bool:
    """For ``exclude_if``: a key that says nothing is left out of the document."""
    return value is None


def is_false(value: object) -> bool:
    """Likewise of a key that says no."""
    return value is False


def is_empty(value: object) -> bool:
    """Likewise of what has no items."""
    return not value


def may_lack(*keys: str) -> Callable[[dict[str, Any]], None]:
    """For ``json_schema_extra``: keys that a document does not always have, although what is missing has a default."""

    def without(schema: dict[str, Any]) -> None:
        schema["required"] = [key for key in schema["required"] if key not in keys]

    return without


def fail(message: str) -> PydanticCustomError:
    """What a validator raises to have its own words in the message."""
    # Through the context, so that braces in the message are not read as a format.
    return PydanticCustomError("ckptsurg", "{text}", {"text": message})


def canonical_json(value: object) -> bytes:
    """One spelling for one value: sorted keys, no white space, UTF-8."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def suggest(word: object, known: Sequence[str]) -> str:
    """``; nearest: freeze`` or, where nothing is near, ``; one of: ...``."""
    folded = {candidate.lower(): candidate for candidate in known}
    near = [folded[match] for match in closest(str(word).lower(), folded, 2)]
    if near:
        return "; nearest: " + ", ".join(near)
    return "; one of: " + ", ".join(known)


# --- From validation errors to problems -------------------------------------------------------------


def _kind(value: object) -> str:
    return {bool: "boolean", int: "number", float: "number", str: "text", list: "list", dict: "mapping"}.get(
        type(value), "null" if value is None else type(value).__name__
    )


def _described(value: object) -> str:
    return "null" if value is None else f"the {_kind(value)} {quoted(value)}"


_EXPECTED = {
    "string_type": "text",
    "int_type": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "list_type": "a list",
    "tuple_type": "a list",
    "dict_type": "keys and values",
    "model_type": "keys and values",
    "model_attributes_type": "keys and values",
}


def _version_problems(text: Text) -> Iterator[Problem]:
    place = ("version",)
    if "version" not in text.data:
        yield Problem("version", "missing; write `version: 1`", 1, place)
    elif type(found := text.data["version"]) is not int:
        message = f"expected the number 1, found {_described(found)}"
        yield Problem("version", message, text.line(place), place)
    elif found != 1:
        yield Problem("version", f"{quoted(found)} is not known; this ckptsurg reads 1", text.line(place), place)


def _empty_keys(text: Text, nullable: frozenset[str]) -> Iterator[Problem]:
    """A key whose value was commented out must not turn off what it is for."""
    for key, value in text.data.items():
        if value is None and key != "version" and key not in nullable:
            place = (str(key),)
            yield Problem(shown(key), "nothing follows; give it a value, or leave the key out", text.line(place), place)


def _not_finite(text: Text) -> Iterator[Problem]:
    """Numbers that JSON does not have; only a document that was given as an object can hold them."""
    waiting: list[tuple[Place, Any]] = [((), text.data)]
    while waiting:
        place, value = waiting.pop()
        if isinstance(value, dict):
            waiting += [((*place, str(key)), inner) for key, inner in value.items()]
        elif isinstance(value, list | tuple):
            waiting += [((*place, position), inner) for position, inner in enumerate(value)]
        elif isinstance(value, float) and not math.isfinite(value):
            yield Problem(describe_place(place), f"{value} is not a number that a document may hold", None, place)


def _problems(model: type[Model], error: ValidationError, text: Text) -> Iterator[Problem]:
    details = error.errors(include_url=False)
    unknown = {(detail["loc"][:-1], detail["loc"][-1]) for detail in details if detail["type"] == "extra_forbidden"}
    for detail in details[:_MOST_PROBLEMS]:
        if detail["type"] == "missing" and any(
            parents == detail["loc"][:-1] and closest(str(detail["loc"][-1]), [str(key)]) for parents, key in unknown
        ):
            continue  # the slip itself is reported, with this key as the nearest
        place = text.nearest(tuple(part for part in detail["loc"]))
        yield Problem(describe_place(place), _explain(model, detail), text.line(place), place)
    if (more := len(details) - _MOST_PROBLEMS) > 0:
        yield Problem("", f"and {counted(more, 'problem')} more")


def _explain(model: type[Model], detail: ErrorDetails) -> str:
    kind, value = detail["type"], detail["input"]
    if kind == "extra_forbidden":
        *parents, key = detail["loc"]
        return f'unknown key "{shown(key)}"' + suggest(key, _fields(model, parents))
    if kind == "missing":
        return f'the key "{detail["loc"][-1]}" is missing'
    if kind in _EXPECTED:
        return f"expected {_EXPECTED[kind]}, found {_described(value)}"
    if kind == "literal_error":
        known = re.findall(r"'([^']*)'", detail["ctx"]["expected"]) or [detail["ctx"]["expected"]]
        return f"{quoted(value)} is not known" + suggest(value, known)
    if kind == "ckptsurg":
        return detail["msg"]
    if kind == "string_pattern_mismatch":
        return f"{quoted(value)} is not of the form {detail['ctx']['pattern'].strip('^$')}"
    message = detail["msg"]
    return f"{message[0].lower()}{message[1:]}, found {quoted(value)}"


def _fields(model: type[Any], path: Sequence[str | int]) -> list[str]:
    """The keys that the model has at a path."""
    for part in path:
        annotation = _keys(model).get(part) if isinstance(part, str) else None
        if (inner := next(_models_in(annotation), None)) is not None:
            model = inner
    if issubclass(model, Model):
        return [info.alias or name for name, info in model.model_fields.items()]
    return list(_keys(model))


def _keys(model: type[Any]) -> Mapping[str, Any]:
    """The type of each key."""
    if issubclass(model, Model):
        return {name: info.annotation for name, info in model.model_fields.items()}
    return get_type_hints(model)


def _models_in(annotation: object) -> Iterator[type[Any]]:
    if isinstance(annotation, type) and (issubclass(annotation, Model) or is_typeddict(annotation)):
        yield annotation
    for argument in get_args(annotation):
        yield from _models_in(argument)
