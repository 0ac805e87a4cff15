"""A second implementation of the contract: slow, naive and short. It shares no code with ckptsurg.

A file is read by hand, a pattern is tried name by name, a digest is taken of bytes in memory.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

from blake3 import blake3

BITS = {
    "BOOL": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "C64": 64, "F64": 64, "I64": 64, "U64": 64,
}  # fmt: skip
#: F8_E8M0 has neither zero nor sign: what it would be to draw one, the contract does not say.
DRAWABLE = {"F64", "F32", "F16", "BF16", "C64", "F8_E5M2", "F8_E4M3", "F8_E4M3FNUZ", "F8_E5M2FNUZ"}


class Wrong(Exception):
    """The spec is in error."""


# --- Files ------------------------------------------------------------------------------------------


@dataclass
class Tensor:
    dtype: str
    shape: tuple[int, ...]
    data: bytes
    file: str = ""
    offset: int = 0  # in the file, in bytes


@dataclass
class Shard:
    size: int
    header: bytes
    metadata: dict[str, str] | None
    data_start: int
    spans: list[tuple[int, int]]  # of its tensors, relative to the data, in order


@dataclass
class Stored:
    tensors: dict[str, Tensor] = field(default_factory=dict)
    shards: dict[str, Shard] = field(default_factory=dict)
    index: dict | None = None


def read_checkpoint(path: Path) -> Stored:
    stored = Stored()
    if path.is_file():
        files = [path]
    elif (path / "model.safetensors").exists():
        files = [path / "model.safetensors"]
    else:
        stored.index = json.loads((path / "model.safetensors.index.json").read_bytes())
        files = [path / name for name in sorted(set(stored.index["weight_map"].values()))]
    for file in files:
        raw = file.read_bytes()
        start = 8 + int.from_bytes(raw[:8], "little")
        entries = json.loads(raw[8:start])
        metadata = entries.pop("__metadata__", None)
        spans = sorted(tuple(entry["data_offsets"]) for entry in entries.values())
        stored.shards[file.name] = Shard(len(raw), raw[8:start], metadata, start, spans)
        for name, entry in entries.items():
            begin, end = entry["data_offsets"]
            assert name not in stored.tensors
            data = raw[start + begin : start + end]
            stored.tensors[name] = Tensor(entry["dtype"], tuple(entry["shape"]), data, file.name, start + begin)
    return stored


def digest(data: bytes, algorithm: str) -> str:
    hasher = blake3(data) if algorithm == "blake3" else hashlib.sha256(data)
    return f"{algorithm}:{hasher.hexdigest()}"


def nbytes(dtype: str, shape: tuple[int, ...]) -> int:
    return prod(shape) * BITS[dtype] // 8


# --- Patterns ---------------------------------------------------------------------------------------


def expand(pattern: str) -> list[str]:
    """Braces as in the shell, without nesting."""
    if set("{}") & set(re.sub(r"\{[^{}]*\}", "", pattern)):
        raise Wrong(f"nested or open braces: {pattern}")
    group = re.search(r"\{([^{}]*(?:,|\.\.)[^{}]*)\}", pattern)
    if group is None:
        return [pattern]
    numbers = re.fullmatch(r"(\d+)\.\.(\d+)", group[1])
    if numbers:
        first, last = int(numbers[1]), int(numbers[2])
        step = 1 if last >= first else -1
        parts = [str(number) for number in range(first, last + step, step)]
    else:
        parts = group[1].split(",")
    head, tail = pattern[: group.start()], pattern[group.end() :]
    alternatives = [text for part in parts for text in expand(head + part + tail)]
    if len(alternatives) > 10_000:
        raise Wrong("too many alternatives")
    return alternatives


def steps_of(pattern: str) -> list[tuple[str, str]]:
    """``layers[-2:].*`` as (glob layers), (slice -2:), (glob *)."""
    steps = []
    for segment in re.split(r"[./]", pattern):
        glob, brackets = re.fullmatch(r"(.*?)((?:\[[^\[\]]*\])*)", segment, re.DOTALL).groups()
        if segment == "**":
            steps.append(("deep", ""))
            continue
        if "**" in glob or "[" in glob or "]" in glob:
            raise Wrong(f"malformed segment: {segment}")
        if glob or not brackets:
            steps.append(("glob", glob))
        for inside in re.findall(r"\[(.*?)\]", brackets):
            if not re.fullmatch(r"-?\d+|(-?\d+)?:(-?\d+)?(:(-?\d+)?)?", inside):
                raise Wrong(f"malformed slice: {inside}")
            steps.append(("slice", inside))
    return steps


def sliced(text: str, numbers: set[int]) -> set[int]:
    """The children that a slice takes, of those there are."""
    bounds = [int(part) if part else None for part in text.split(":")]
    count = max(numbers) + 1
    step = bounds[2] if len(bounds) == 3 else None
    has_gaps = numbers != set(range(min(numbers), count))
    if has_gaps and (step not in (None, 1) or any(bound is not None and bound < 0 for bound in bounds[:2])):
        raise Wrong(f"[{text}] over numbers with gaps")
    if step == 0:
        raise Wrong("a step of zero")
    if len(bounds) == 1:
        child = bounds[0] + count if bounds[0] < 0 else bounds[0]
        if child not in numbers:
            raise Wrong(f"[{text}] is out of range")
        return {child}
    if any(bound is not None and not -count <= bound <= count for bound in bounds[:2]):
        raise Wrong(f"[{text}] is out of range")
    return set(range(count)[slice(*bounds)]) & numbers


def matches(steps: list, segments: list[str], at: int, everything: list[list[str]]) -> bool:
    """Whether steps match segments from ``at`` on, or the module that some of them name."""
    if not steps:
        return True
    (kind, text), rest = steps[0], steps[1:]
    if kind == "deep":
        # No short cut: every module that a slice may be taken of is looked at.
        return sum(matches(rest, segments, later, everything) for later in range(at, len(segments) + 1)) > 0
    if at == len(segments):
        return False
    if kind == "slice":
        number = "0|[1-9][0-9]*"
        if not re.fullmatch(number, segments[at]):
            return False
        family = {other[at] for other in everything if len(other) > at and other[:at] == segments[:at]}
        numbers = {int(child) for child in family if re.fullmatch(number, child)}
        return int(segments[at]) in sliced(text, numbers) and matches(rest, segments, at + 1, everything)
    glob = "".join({"*": ".*", "?": "."}.get(character, re.escape(character)) for character in text)
    return bool(re.fullmatch(glob, segments[at], re.DOTALL)) and matches(rest, segments, at + 1, everything)


def alternatives_of(pattern: str, names: list[str]) -> list[str]:
    return [pattern] if pattern in names or pattern.startswith("re:") else expand(pattern)


def select_one(pattern: str, names: list[str], whole: list[str] | None = None) -> set[str]:
    """What one pattern without braces selects; slices count the children that the whole base has."""
    if pattern in names:
        return {pattern}
    if pattern.startswith("re:"):
        try:
            return {name for name in names if re.fullmatch(pattern[3:], name)}
        except re.error:
            raise Wrong(f"no regular expression: {pattern}") from None
    steps = steps_of(pattern)
    everything = [re.split(r"[./]", name) for name in whole or names]
    return {name for name in names if matches(steps, re.split(r"[./]", name), 0, everything)}


def fits(name: str, where: dict, base: dict[str, Tensor]) -> bool:
    tensor = base[name]
    if "beside" in where:
        module = re.split(r"[./]", name)[:-1]
        if [*module, where["beside"]] not in [re.split(r"[./]", other) for other in base]:
            return False
    return tensor.dtype == where.get("dtype", tensor.dtype) and len(tensor.shape) == where.get(
        "ndim", len(tensor.shape)
    )


def select(selector: str | dict | list, base: dict[str, Tensor], whole: dict[str, Tensor] | None = None) -> set[str]:
    """What a selector of a spec selects of these tensors, which are left of the whole base.

    Raises:
        Wrong: if an item, or an alternative of one, does nothing.
    """
    names, selected = list(base), set()
    for position, item in enumerate(selector if isinstance(selector, list) else [selector]):
        item = {"match": item} if isinstance(item, str) else item
        pattern = item["match"]
        takes_away = pattern.startswith("!") and pattern not in names
        if takes_away and position == 0:
            raise Wrong("a list begins with !")
        hit = set()
        for alternative in alternatives_of(pattern[takes_away:], names):
            matched = select_one(alternative, names, list(whole or base))
            found = {name for name in matched if fits(name, item.get("where", {}), base)}
            found = found & selected if takes_away else found
            if not found and not item.get("optional"):
                raise Wrong(f"{alternative} does nothing")
            hit |= found
        if len(hit) != item.get("expect", len(hit)):
            raise Wrong(f"{pattern} selects {len(hit)}")
        selected = selected - hit if takes_away else selected | hit
    return selected


# --- Fates ------------------------------------------------------------------------------------------


@dataclass
class Fate:
    action: str  # copy, drop, reinit, add
    frozen: bool
    dtype: str
    shape: tuple[int, ...]
    init: object = None
    keep: bool = False


def fates(spec: dict, base: dict[str, Tensor]) -> dict[str, Fate]:
    """What becomes of every tensor of the base, and of those that are added (after an extra ``+``).

    Raises:
        Wrong: if the spec is in error.
    """
    for rule in [*spec.get("reinit", ()), *spec.get("add", ())]:
        check_init(rule["init"])
    gone = select(spec["drop"], base) if "drop" in spec else set()
    left = {name: tensor for name, tensor in base.items() if name not in gone}
    frozen = select(spec["freeze"], left, base) if "freeze" in spec else set()
    trained = select(spec["train"], left, base) if "train" in spec else set()
    drawn: dict[str, dict] = {}
    for rule in spec.get("reinit", ()):
        if rule["match"].startswith("!") and rule["match"] not in left:
            raise Wrong("a rule begins with !")
        for name in select(rule, left, base):
            if name in drawn:
                raise Wrong(f"two reinit rules claim {name}")
            drawn[name] = rule
    found = {name: Fate("drop", False, base[name].dtype, base[name].shape) for name in gone}
    for name, tensor in left.items():
        if name in frozen and name in trained:
            raise Wrong(f"freeze and train claim {name}")
        if name in drawn:
            rule = drawn[name]
            keeps_still = rule.get("frozen", False)
            if (name in frozen and not keeps_still) or (name in trained and keeps_still):
                raise Wrong(f"reinit and freeze or train claim {name}")
            shape = reshaped(tensor.shape, rule.get("shape"))
            if rule.get("keep") and len(shape) != len(tensor.shape):
                raise Wrong("keep wants the old rank")
            check_drawable(tensor.dtype, rule["init"])
            found[name] = Fate("reinit", keeps_still, tensor.dtype, shape, rule["init"], rule.get("keep", False))
            continue
        if "freeze" in spec and "train" in spec and name not in frozen | trained:
            raise Wrong(f"neither freeze nor train has {name}")
        still = name not in trained if "train" in spec else name in frozen
        found[name] = Fate("copy", still, tensor.dtype, tensor.shape)
    for rule in spec.get("add", ()):
        if rule["name"] in left or "+" + rule["name"] in found or rule["name"] == "__metadata__":
            raise Wrong(f"{rule['name']} exists")
        check_drawable(rule["dtype"], rule["init"])
        fate = Fate("add", rule.get("frozen", False), rule["dtype"], tuple(rule["shape"]), rule["init"])
        found["+" + rule["name"]] = fate
    if all(fate.action == "drop" for fate in found.values()):
        raise Wrong("nothing is left")
    return found


def reshaped(shape: tuple[int, ...], change: dict | list | None) -> tuple[int, ...]:
    if change is None:
        return shape
    if isinstance(change, list):
        return tuple(change)
    sizes = list(shape)
    if len({int(dimension) % max(len(shape), 1) for dimension in change}) < len(change):
        raise Wrong("a dimension is given twice")
    for dimension, size in change.items():
        if not -len(shape) <= int(dimension) < len(shape):
            raise Wrong(f"dimension {dimension} is out of rank")
        sizes[int(dimension)] = size
    return tuple(sizes)


def check_init(init: object) -> str:
    [(name, arguments)] = init.items() if isinstance(init, dict) else [(init, {})]
    known = {"zeros": (), "ones": (), "normal": ("mean", "std"), "uniform": ("a", "b"), "constant": ("val",)}
    if name not in known or not set(arguments) <= set(known[name]):
        raise Wrong(f"unknown initializer {init}")
    return name


def check_drawable(dtype: str, init: object) -> None:
    if dtype not in DRAWABLE or (dtype == "C64" and check_init(init) == "uniform"):
        raise Wrong(f"{dtype} cannot be drawn")


# --- The manifest -----------------------------------------------------------------------------------


def root(tensors: dict[str, dict], algorithm: str) -> str:
    """The root of records that have dtype, shape, frozen and digest."""
    lines = []
    for name in sorted(tensors, key=lambda name: name.encode()):
        row = [name, *(tensors[name][key] for key in ("dtype", "shape", "frozen", "digest"))]
        lines.append(json.dumps(row, separators=(",", ":"), ensure_ascii=False) + "\n")
    return digest("".join(lines).encode(), algorithm)


def overlap(old: Tensor, new: Tensor) -> tuple[bytes, bytes]:
    """The bytes of the part that two tensors of one rank have in common: of the old, and of the new."""
    size = BITS[old.dtype] // 8

    def cut(tensor: Tensor, dimension: int, start: int) -> bytes:
        if dimension == len(tensor.shape):
            return tensor.data[start * size : (start + 1) * size]
        row = prod(tensor.shape[dimension + 1 :])
        common = min(old.shape[dimension], new.shape[dimension])
        return b"".join(cut(tensor, dimension + 1, start + index * row) for index in range(common))

    return cut(old, 0, 0), cut(new, 0, 0)
