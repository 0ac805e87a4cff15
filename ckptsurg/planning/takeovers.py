"""Whose bytes tensors get that are not drawn, in which dtype, and what they are called: `graft`, `cast`, `rename`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from ..parsing import Place
from ..patterns import PatternError
from ..selectors import Selection, Space
from ..tensors import FLOATS, TensorInfo, TensorSource, refused_name
from ..wording import counted, enumerate_names, quoted, shown
from .findings import Findings
from .output_names import Template, renumbered

__all__ = ["Graft", "casts", "grafts", "output_names"]


@dataclass(frozen=True, slots=True)
class Graft:
    """Where a tensor's bytes come from.

    Attributes:
        position: Of the rule.
        donor: What the other checkpoint is called.
        name: What the tensor is called there.
    """

    position: int
    donor: str
    name: str


def grafts(
    findings: Findings, space: Space, donors: Mapping[str, TensorSource], drawn: Mapping[str, int]
) -> dict[str, Graft]:
    """The tensors whose bytes another checkpoint gives.

    Args:
        findings: Where problems go.
        space: The tensors that are left.
        donors: The other checkpoints, by what they are called.
        drawn: The reinit rule of each tensor that is drawn.
    """
    found: dict[str, Graft] = {}
    for position, rule in enumerate(findings.spec.graft):
        place = ("graft", position)
        selected = findings.select(place, [rule], space)
        donor = donors.get(rule.donor)
        if donor is None:
            given = f"; given: {enumerate_names(sorted(donors))}" if donors else ""
            message = f"no checkpoint is called {quoted(rule.donor)}{given}; give it: --donor {shown(rule.donor)}=CKPT"
            findings.add((*place, "from"), message)
            continue
        names = space.names.in_order(selected.names)
        if both := [name for name in names if name in drawn]:
            findings.claimed_twice(both, ("reinit", drawn[both[0]]), place, "a drawn tensor has no bytes to be grafted")
        if both := [name for name in names if name in found]:
            findings.claimed_twice(both, ("graft", found[both[0]].position), place, "make a pattern narrower")
        called = _called(findings, (*place, "named"), rule.match, rule.named, space, selected.names, {})
        theirs = {name: called.get(name, name) for name in names}
        _refuse_unlike(findings, place, donor, {name: space.tensors[name] for name in names}, theirs)
        found |= {name: Graft(position, rule.donor, theirs[name]) for name in names}
    return found


def _refuse_unlike(
    findings: Findings,
    place: Place,
    donor: TensorSource,
    ours: Mapping[str, TensorInfo],
    theirs: Mapping[str, str],
) -> None:
    if missing := [theirs[name] for name in ours if theirs[name] not in donor.tensors]:
        remedy = "`named` says what they are called there"
        findings.add(place, f"{donor.label} has no {enumerate_names(missing, 3)}; {remedy}")
    for name, info in ours.items():
        other = donor.tensors.get(theirs[name])
        if other is not None and other != info:
            remedy = "cast one of them first" if other.shape == info.shape else "a graft keeps the shape"
            what = f"{shown(name)} is {info}, and {shown(theirs[name])} of {donor.label} is {other}"
            findings.add(place, f"{what}; {remedy}")
            return


def casts(findings: Findings, space: Space, drawn: Mapping[str, int]) -> dict[str, str]:
    """The new dtype of tensors that get one. Of several rules for one tensor the last wins."""
    found: dict[str, str] = {}
    for position, rule in enumerate(findings.spec.cast):
        place = ("cast", position)
        if rule.dtype not in FLOATS:
            findings.add((*place, "dtype"), f"{rule.dtype} is none of {', '.join(sorted(FLOATS))}")
            continue
        selected = space.names.in_order(findings.select(place, [rule], space).names)
        floats = [name for name in selected if space.tensors[name].dtype in FLOATS]
        others = len(selected) - len(floats)
        if others:
            findings.note(f"{findings.spec.written(place)}: {counted(others)} without fractions, or packed, not cast")
        if selected and not floats:
            findings.add(place, f'"{shown(rule.match)}" selects nothing that can be cast')
        kept = [name for name in floats if name in drawn and findings.spec.reinit[drawn[name]].keep]
        if kept:
            remedy = "what is kept of a tensor keeps its bits, and its dtype"
            findings.claimed_twice(kept, ("reinit", drawn[kept[0]]), place, remedy)
        found |= dict.fromkeys(floats, rule.dtype)
    return {name: dtype for name, dtype in found.items() if dtype != space.tensors[name].dtype}


def output_names(findings: Findings, space: Space, drop: Selection) -> dict[str, str]:
    """What tensors are called in the output, where that is another name.

    Args:
        findings: Where problems go.
        space: The tensors that are left.
        drop: What is dropped; its items say whether blocks are renumbered.
    """
    spec = findings.spec
    closing = {position for position, item in enumerate(spec.drop or ()) if item.renumber}
    now: dict[str, str] = {}
    if closing:
        gone = [name for name in drop.names if drop.item[name] in closing]
        try:
            now = renumbered(list(space.tensors), sorted(gone))
        except PatternError as error:
            findings.add(("drop", min(closing), "renumber"), str(error))
        space = replace(space, called=now)
    called = dict(now)
    owner: dict[str, int] = {}
    for position, rule in enumerate(spec.rename):
        place = ("rename", position)
        selected = findings.select(place, [rule], space).names
        if both := space.names.in_order(selected & owner.keys()):
            findings.claimed_twice(both, ("rename", owner[both[0]]), place, "make a pattern narrower")
        called |= _called(findings, (*place, "to"), rule.match, rule.to, space, selected, now)
        owner |= dict.fromkeys(selected, position)
    _refuse_collisions(findings, space, called, owner, closing)
    return {name: new for name, new in called.items() if new != name}


def _called(
    findings: Findings,
    place: Place,
    pattern: str,
    to: str | None,
    space: Space,
    selected: Iterable[str],
    now: Mapping[str, str],
) -> dict[str, str]:
    """The names that a pattern selects, and what a template makes of them."""
    wanted = set(selected)
    if to is None or not wanted:
        return {}
    try:
        template = Template(pattern, to, space.names)
        return {
            name: template.applied(alternative, name, now.get(name, name))
            for alternative, names in space.names.match(pattern)
            for name in names
            if name in wanted
        }
    except PatternError as error:
        findings.add(place, f'"{shown(pattern)}": {error}')
        return {}


def _refuse_collisions(
    findings: Findings, space: Space, called: Mapping[str, str], owner: Mapping[str, int], closing: Iterable[int]
) -> None:
    if not called:
        return  # the base's own names are fit, and each stands once
    by_name: dict[str, list[str]] = defaultdict(list)
    for name in space.tensors:
        by_name[called.get(name, name)].append(name)
    for new, names in by_name.items():
        rules = [owner[name] for name in names if name in owner]
        place: Place = ("rename", rules[-1], "to") if rules else ("drop", min(closing, default=0))
        if reason := refused_name(new):
            findings.add(place, f'"{shown(new)}" {reason}')
        if len(names) > 1:
            findings.add(place, f"{enumerate_names(names, 3)} would all be called {shown(new)}")
            return
