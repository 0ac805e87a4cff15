"""What freezing and watching say, whatever the framework."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence

from ..causes import CAUSES
from ..errors import FreezeError, FrozenWeightsChanged
from ..manifest import Manifest
from ..report import Difference
from ..wording import enumerate_names, on_ranks, shown

__all__ = [
    "about_to_move",
    "absent",
    "cannot_be_frozen",
    "described",
    "left_as_they_are",
    "listed",
    "loading_hint",
    "mismatches",
    "not_as_published",
    "the_model",
]

_LISTED = 20
_OTHER_BITS = "has other bits: not loaded, or from another file"
_ABSENT = "is not in the model"


def listed(head: str, problems: Sequence[str]) -> str:
    """What is wrong under a head, a line each; of many the first."""
    more = [f"... and {len(problems) - _LISTED} more"] if len(problems) > _LISTED else []
    return "\n  ".join([head, *problems[:_LISTED], *more])


def the_model(model: object, rank: int | None) -> str:
    """A model, and which of several processes looked at its own of it."""
    return f"the model ({type(model).__name__}){'' if rank is None else f' on rank {rank}'}"


def cannot_be_frozen(model: object, problems: Sequence[str], hint: str | None, rank: int | None = None) -> FreezeError:
    """The error of a model against whose freeze something stands."""
    return FreezeError(listed(f"{the_model(model, rank)} cannot be frozen:", problems), hint=hint)


def absent(name: str, advice: str = "") -> str:
    """Of a frozen tensor that the model lacks."""
    return f'"{shown(name)}" {_ABSENT}{advice}'


def mismatches(
    drifted: Iterable[Difference], manifest: Manifest, dtype_of: Callable[[str], str], *, allow_widened: bool
) -> Iterator[str]:
    """Frozen tensors that a model does not hold as its manifest records them, a line each; those of one cast in one.

    Args:
        drifted: How they differ.
        manifest: The manifest.
        dtype_of: The dtype that the model has for a tensor of the manifest.
        allow_widened: Whether a wider dtype with the same values is accepted.
    """
    casts: dict[tuple[str, str, bool], list[str]] = defaultdict(list)
    for difference in drifted:
        name, verdict = difference.name, difference.verdict
        if verdict == "missing":
            yield absent(name)
        elif verdict == "changed":
            yield f'"{shown(name)}" {_OTHER_BITS}'
        elif verdict == "dtype" or (verdict == "dtype_only" and not allow_widened):
            casts[manifest.tensors[name].dtype, dtype_of(name), verdict == "dtype_only"].append(name)
        elif verdict != "dtype_only":
            yield difference.describe()
    for (expected, found, widened), names in casts.items():
        line = f"{enumerate_names(names)}: expected {expected}, found {found}: load the model in the published dtype"
        yield f"{line}; the values are the same, and `allow_widened=True` accepts them" if widened else line


def loading_hint(problems: Iterable[str]) -> str | None:
    """What to do where a model holds other weights than its manifest says."""
    if not any(line.endswith((_OTHER_BITS, _ABSENT)) for line in problems):
        return None
    return "load the published weights first; where the model has other names than the file, give `names`"


def left_as_they_are(unknown: Sequence[str]) -> str:
    """The warning of parameters that a manifest lacks."""
    return f"left as they are, the manifest lacks them: {enumerate_names(unknown)}"


def not_as_published(trainable: Collection[Difference]) -> str:
    """The warning of trainable tensors in another shape or dtype than their manifest's; empty where there are none."""
    if not trainable:
        return ""
    said = [f"{one.name} ({one.describe_detail()})" for one in trainable]
    return (
        f"not as published, but trainable, and so left as they are: {enumerate_names(said)}; "
        "where they were not resized on purpose, load the published weights"
    )


def described(model: object, manifest: Manifest, kept: str | None) -> str:
    """A frozen model in a line.

    Args:
        model: The model.
        manifest: What it obeys.
        kept: What is kept in evaluation mode, if anything is.
    """
    in_part = sum(record.rows is not None for record in manifest.tensors.values())
    parts = [f"{manifest.counts['frozen'] - in_part} frozen"]
    if in_part:
        parts.append(f"{in_part} in part")
    parts.append(f"{manifest.counts['trainable']} trainable")
    if kept:
        parts.append(kept)
    return f"FrozenModel({type(model).__name__}: {', '.join(parts)})"


def about_to_move(about: Mapping[str, str], when: str, rank: int | None = None) -> FrozenWeightsChanged:
    """The error of a step before which frozen tensors are about to move.

    Args:
        about: Their names, with the codes of the causes.
        when: Said before: ``before step 7:``.
        rank: Which of several processes is about to move its part of them.
    """
    where = () if rank is None else (rank,)
    by_code: dict[str, list[str]] = defaultdict(list)
    for name, code in about.items():
        by_code[code].append(name)
    lines = [
        f"{enumerate_names(on_ranks(name, where) for name in names)}; cause: {code} ({CAUSES[code].explanation})"
        for code, names in by_code.items()
    ]
    hint = "; ".join(CAUSES[code].remedy for code in by_code)
    ranks = dict.fromkeys(about, where) if where else None
    return FrozenWeightsChanged("\n  ".join([when, *lines]), hint=hint, causes=about, ranks=ranks)
