"""What documents say of keys and options is made here, from the schema of a spec and from the commands themselves.

`python -m docs.reference` writes it between the marks of docs/spec.md and docs/commands.md.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import click

import ckptsurg.cli.commands as commands
from ckptsurg.schemas import schema

FILES = {name: Path(__file__).parent / name for name in ("spec.md", "commands.md")}

#: Of keys whose descriptions the schema lacks.
_OURS = {
    "version": "Version of the form: 1.",
    "name": "What the tensor is called.",
    "shape": "Its sizes.",
    "dtype": "Its dtype.",
    "init": "What to draw.",
    "frozen": "Whether it is frozen.",
    "from": "What the other checkpoint is called on the command line.",
}


def _text(words: str) -> str:
    words = re.sub(r"``(.+?)``", r"`\1`", " ".join(words.split()))
    return words.replace("; None ", "; without it ").replace("None ", "Without it, ").replace("|", r"\|")


def _descriptions(description: str) -> dict[str, str]:
    """What the part `Attributes:` of a description says of each."""
    _, _, attributes = description.partition("Attributes:\n")
    found = re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", attributes, re.MULTILINE)
    return {name: _text(words) for name, words in found}


def _kind(schema: Mapping[str, Any]) -> str:
    """What is written for a key, in words."""
    if "$ref" in schema:
        return "object" if schema["$ref"].endswith(("Where", "ConfigEdits")) else "rule"
    if "anyOf" in schema:
        kinds = [_kind(one) for one in schema["anyOf"] if one.get("type") != "null"]
        return "initializer" if len(kinds) == 2 and kinds[0] == "name" else " or ".join(dict.fromkeys(kinds))
    if "const" in schema:
        return str(schema["const"])
    if "enum" in schema:
        return "dtype" if "BF16" in schema["enum"] else "name"
    if schema.get("type") == "array":
        inner = _kind(schema.get("items", {}))
        return "list" if inner == "any" else f"list of {inner}s" if not inner.endswith(")") else "list"
    return {"string": "text", "integer": "whole number", "boolean": "true, false", "number": "number"}.get(
        str(schema.get("type")), "object" if schema.get("type") == "object" else "any"
    )


def _default(key: str, schema: Mapping[str, Any], required: Iterable[str]) -> str:
    if key in required:
        return "required"
    default = schema.get("default")
    if default in (None, [], {}, ()):
        return ""
    return f"`{default}`".replace("False", "false").replace("True", "true")


def _keys(model: Mapping[str, Any], *, without: Iterable[str] = ()) -> list[str]:
    said = _descriptions(model.get("description", ""))
    rows = ["| key | written as | default | |", "| --- | --- | --- | --- |"]
    for key, field in model["properties"].items():
        if key in without:
            continue
        what = said.get({"from": "donor"}.get(key, key)) or _OURS.get(key, "")
        required = model.get("required", ())
        rows.append(f"| `{key}` | {_kind(field)} | {_default(key, field, required)} | {what} |")
    return rows


def _initializers(written: Mapping[str, Any]) -> list[str]:
    rows = ["| initializer | arguments |", "| --- | --- |"]
    for name, model in sorted(written.items()):
        if "enum" in model:
            rows.append(f"| `{name}` | a module: {', '.join(f'`{one}`' for one in model['enum'])} |")
            continue
        arguments = []
        for key, field in model["properties"].items():
            default = "" if key in model.get("required", ()) else f" = {field.get('default')}"
            arguments.append(f"`{key}{default}`")
        rows.append(f"| `{name}` | {', '.join(arguments) or 'none'} |")
    return rows


def spec_parts() -> dict[str, list[str]]:
    """The tables of docs/spec.md by their marks."""
    spec = schema("spec")
    models = spec["$defs"]
    item = tuple(models["Item"]["properties"])
    parts = {"spec": _keys(spec), "item": _keys(models["Item"]), "where": _keys(models["Where"])}
    for key, model in {
        "drop": "DropItem",
        "freeze": "FreezeItem",
        "reinit": "ReinitRule",
        "cast": "CastRule",
        "graft": "GraftRule",
        "rename": "RenameRule",
    }.items():
        parts[key] = _keys(models[model], without=item)
    parts["add"] = _keys(models["AddRule"])
    parts["config"] = _keys(models["ConfigEdits"])
    parts["init"] = _initializers(models["AddRule"]["properties"]["init"]["anyOf"][1]["properties"])
    dtypes = models["AddRule"]["properties"]["dtype"]["enum"]
    parts["dtypes"] = [", ".join(f"`{one}`" for one in dtypes)]
    return parts


def command_parts() -> dict[str, list[str]]:
    """The options of each command by its name."""
    parts = {}
    for name, command in commands.cli.commands.items():
        rows = ["| option | |", "| --- | --- |"]
        for option in command.params:
            if isinstance(option, click.Option) and option.name != "help":
                metavar = "" if option.is_flag else " " + _metavar(option)
                spelled = ", ".join(f"`{one}{metavar if one.startswith('--') else ''}`" for one in option.opts)
                rows.append(f"| {spelled} | {_text(option.help or '')}{' Required.' if option.required else ''} |")
        parts[name] = rows
    return parts


def _metavar(option: click.Option) -> str:
    if isinstance(option.type, click.Choice):
        return "{" + ",".join(option.type.choices) + "}"
    return option.metavar or option.type.name.upper()


def rendered(name: str, text: str) -> str:
    """A document with its tables made anew."""
    for mark, lines in (spec_parts() if name == "spec.md" else command_parts()).items():
        begin, end = f"<!-- {mark} -->\n", f"<!-- /{mark} -->"
        if text.count(begin) != 1 or text.count(end) != 1:
            raise ValueError(f"{name}: no place for {mark}: {begin.strip()} and {end} stand once each")
        before, _, rest = text.partition(begin)
        text = before + begin + "\n".join(lines) + "\n" + end + rest.partition(end)[2]
    return text


if __name__ == "__main__":
    for name, path in FILES.items():
        path.write_text(rendered(name, path.read_text()))
