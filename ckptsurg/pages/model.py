"""What a page says, as plain data in which nothing is HTML; and that of a plan, and of an output."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ..manifest import Manifest, TensorRecord
from ..patterns import unlike_parts
from ..plans import Action, Plan
from ..spec import ConfigEdits
from ..wording import counted, quoted, shown, size
from .entries import DROPPED, FATES, Change, Entry, Kind, fate
from .heat import Bin, Grid
from .maps import Map, draw
from .places import place_of

__all__ = [
    "MOST_ROWS",
    "CauseGroup",
    "Fact",
    "Names",
    "Page",
    "Row",
    "fate_of",
    "names_of",
    "of_all",
    "of_manifest",
    "of_plan",
]

#: How many tensors a table lists.
MOST_ROWS = 100


@dataclass(frozen=True, slots=True)
class Fact:
    """A number with what it counts, as words for people; ``key`` tells facts apart."""

    key: str
    words: str
    value: str


@dataclass(frozen=True, slots=True)
class CauseGroup:
    """Tensors that moved for one reason.

    Attributes:
        code: The cause code; None where none is settled.
        explanation: What happens.
        remedy: What to do about it.
        tensors: How many there are.
        names: The first of them.
    """

    code: str | None
    explanation: str
    remedy: str
    tensors: int
    names: Sequence[str]


@dataclass(frozen=True, slots=True)
class Row:
    """A line of a table of tensors: name, what was found in words, its cause, its size, and by how much it changed."""

    name: str
    found: str
    cause: str | None
    info: str
    change: Change | None


@dataclass(frozen=True, slots=True)
class Names:
    """A list of names: how many, in words with what they have in common; the first, and whether that is a failure."""

    words: str
    tensors: int
    names: Sequence[str]
    is_failure: bool


@dataclass(frozen=True, slots=True)
class Page:
    """What a page says.

    Attributes:
        kind: ``plan``, ``output``, ``verify`` or ``diff``.
        verdict: What it comes to, in one sentence.
        ok: Whether that is good; None where there is nothing to be proven.
        of: What was looked at, as pairs of a word and a path.
        facts: Its numbers.
        notes: What else there is to know.
        map: The tensors block by block.
        grids: Blocks x roles; empty where nothing was compared.
        bins: How many tensors changed how much; empty where nothing was measured.
        causes: Why.
        rows: The tensors that differ, the largest changes first, as many as a table holds.
        differing: How many differ.
        trained: Trainable tensors that moved, likewise.
        moved: How many did.
        lists: Names that belong to neither.
        renamed: Modules and tensors that the output of a plan calls otherwise: old names and new.
        edits: Of its config.json: keys, and what they become in words.
    """

    kind: str
    verdict: str
    ok: bool | None
    of: Sequence[tuple[str, str]]
    facts: Sequence[Fact]
    notes: Sequence[str]
    map: Map
    grids: Sequence[Grid] = ()
    bins: Sequence[Bin] = ()
    causes: Sequence[CauseGroup] = ()
    rows: Sequence[Row] = ()
    differing: int = 0
    trained: Sequence[Row] = ()
    moved: int = 0
    lists: Sequence[Names] = field(default_factory=list)
    renamed: Sequence[tuple[str, str]] = ()
    edits: Sequence[tuple[str, str]] = ()


# --- A plan, an output ---------------------------------------------------------------------------------

_ORIGINS: dict[Action, str] = {
    "copy": "copied",
    "drop": "dropped",
    "reinit": "reinitialised",
    "add": "added",
    "cast": "cast",
    "graft": "grafted",
}


def of_plan(plan: Plan, *, of: Sequence[tuple[str, str]], config: ConfigEdits | None = None) -> Page:
    """What a rewrite would do.

    Args:
        plan: The plan. Its map has the base's blocks, each once, with what is added where it comes to stand.
        of: What it was made of.
        config: The spec's edits of config.json.
    """
    renamed = [(one.name, one.to) for one in plan.output if one.to is not None]
    blocks = {place_of(new).block: place_of(old).block for old, new in renamed}
    entries = []
    for tensor in plan.tensors:
        dropped = tensor.action == "drop"
        kind = fate(_ORIGINS[tensor.action], frozen=tensor.frozen or dropped, in_part=tensor.rows is not None)
        name, to = tensor.name, tensor.to
        if tensor.action == "add" and (block := place_of(name).block) in blocks:
            name, to = blocks[block] + name[len(block) :], name
        entries.append(Entry(name, tensor.info, kind, tensor.frozen, to=to))
    output = [entry for entry in entries if entry.kind is not DROPPED]
    facts = [*_sizes(output), *_counts(_COUNTED, plan.counts)]
    verdict = f"A rewrite would freeze {of_all(plan.counts['frozen'], len(output)).replace('All', 'all')}"
    return Page(
        "plan",
        verdict,
        None,
        of,
        facts,
        plan.notes,
        draw(entries, list(FATES.values())),
        renamed=list(dict.fromkeys(unlike_parts(old, new) for old, new in renamed)),
        edits=[] if config is None else _edits(config),
    )


def _edits(config: ConfigEdits) -> list[tuple[str, str]]:
    changed = [(shown(path), quoted(value, 100)) for path, value in config.set.items()]
    return changed + [(shown(path), "goes") for path in config.unset]


def of_manifest(manifest: Manifest, *, of: Sequence[tuple[str, str]]) -> Page:
    """What an output is; ``of`` says which."""
    entries = [Entry(name, record.info, fate_of(record), record.frozen) for name, record in manifest.tensors.items()]
    facts = [*_sizes(entries), *_counts({word: word for word in _COUNTED.values()}, manifest.counts)]
    facts += [Fact("root", "root", manifest.root), Fact("frozen_root", "root of what is frozen", manifest.frozen_root)]
    words = f"{counted(len(manifest.dropped))} of the base dropped"
    lists = [names_of(words, manifest.dropped)] if manifest.dropped else []
    verdict = f"{of_all(manifest.counts['frozen'], len(entries))} must not change in training"
    return Page("output", verdict, None, of, facts, (), draw(entries, list(FATES.values())), lists=lists)


def fate_of(record: TensorRecord) -> Kind:
    """The fate of a tensor of an output."""
    return fate(record.origin, frozen=record.frozen, in_part=record.rows is not None)


def of_all(count: int, of: int, thing: str = "tensor") -> str:
    """``12 of 14 tensors``, ``All 14 tensors``."""
    return f"All {counted(of, thing)}" if count == of and of > 1 else f"{count:,} of {counted(of, thing)}"


def _sizes(entries: Sequence[Entry]) -> list[Fact]:
    frozen = [entry for entry in entries if entry.frozen]
    total, held = (sum(entry.nbytes for entry in some) for some in (entries, frozen))
    share = f" ({held / total:.1%})" if total else ""
    return [
        Fact("tensors", "tensors", f"{len(entries):,}"),
        Fact("size", "size", size(total)),
        Fact("frozen", "frozen", f"{len(frozen):,}"),
        Fact("frozen_size", "frozen size", f"{size(held)}{share}"),
        Fact("trainable", "trainable", f"{len(entries) - len(frozen):,}"),
    ]


#: Of a plan's counts, those that are said besides, and how.
_COUNTED = {
    "reinit": "reinitialised",
    "add": "added",
    "drop": "dropped",
    "cast": "cast",
    "graft": "grafted",
    "rename": "renamed",
}


def _counts(words: Mapping[str, str], counts: Mapping[str, object]) -> list[Fact]:
    return [Fact(word, word, f"{counts[key]:,}") for key, word in words.items() if counts.get(key)]


def names_of(words: str, names: Sequence[str], *, is_failure: bool = False) -> Names:
    """A list of names, of which as many as a table holds are shown."""
    return Names(words, len(names), [shown(name) for name in names[:MOST_ROWS]], is_failure)
