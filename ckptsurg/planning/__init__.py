"""From a spec and the headers of a base to one action for every tensor. Pure: nothing is read, nothing is written."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence, Set
from dataclasses import replace

from ..errors import SpecError
from ..layers import from_metadata
from ..matching import Names
from ..plans import Counts, Plan, PlannedTensor
from ..selectors import Space, module_and_leaf
from ..spec import Spec
from ..tensors import TensorInfo, TensorSource, refused_name
from ..wording import counted, enumerate_names, shown
from .claims import Claims
from .draws import Draws
from .findings import Findings
from .scale_groups import parted_group
from .takeovers import Graft, casts, grafts, output_names

__all__ = ["plan"]


def plan(spec: Spec, source: TensorSource, donors: Mapping[str, TensorSource] | None = None) -> Plan:
    """Give every tensor of the source one fate.

    Args:
        spec: The spec.
        source: The base.
        donors: Other checkpoints that tensors are taken from, by what the spec calls them.

    Raises:
        SpecError: with everything in the spec that does not fit the source.
    """
    base, layers = source.tensors, from_metadata(getattr(source, "metadata", None))
    findings = Findings(spec)
    space = Space(Names(base, layers), base)
    drop = findings.select(("drop",), spec.drop, space)
    rule_of = findings.rules("drop", drop)
    dropped = {name: rule_of(name) for name in base if name in drop.names}
    left = {name: info for name, info in base.items() if name not in dropped}
    if dropped:
        space = Space(space.names.part(left), left, space.names.part(dropped))
    called = output_names(findings, space, drop)
    space = replace(space, called=called)

    claims = Claims(findings, space)
    given = grafts(findings, space, donors or {}, claims.owners)
    dtypes = casts(findings, space, claims.owners)
    draws = Draws(findings, left, claims.owners, dtypes)
    copied = {name: info for name, info in left.items() if name not in claims.owners}
    planned = {name: _copied(name, info, claims, given.get(name), dtypes.get(name)) for name, info in copied.items()}
    planned |= {name: _drawn(name, left[name], spec, rule, draws, claims) for name, rule in claims.owners.items()}
    planned |= {name: planned[name].model_copy(update={"to": new}) for name, new in called.items()}
    planned |= {name: _dropped(name, base[name], rule) for name, rule in dropped.items()}
    added = _added(findings, {called.get(name, name) for name in left}, draws)
    draws.report_refusals()
    if (parted := parted_group(spec, planned)) is not None:
        findings.add(*parted)
    output = [planned[name] for name in left] + added
    if not output and not findings.problems:
        findings.add(("drop",), "drops every tensor: nothing would be left")
    if findings.problems:
        raise SpecError(spec.label, findings.problems)
    tensors = [planned[name] for name in base] + added
    notes = (*findings.notes, *_odd_outcomes(output), *_odd_shapes(output, base))
    return Plan(version=1, counts=_counts(tensors), tensors=tuple(tensors), notes=notes, seed=spec.seed)


def _counts(tensors: Sequence[PlannedTensor]) -> Counts:
    actions = Counter(tensor.action for tensor in tensors)
    frozen = sum(tensor.frozen for tensor in tensors)
    counts: Counts = {
        "copy": actions["copy"],
        "drop": actions["drop"],
        "reinit": actions["reinit"],
        "add": actions["add"],
        "frozen": frozen,
        "trainable": len(tensors) - actions["drop"] - frozen,
    }
    # Of what is rare nothing is said where there is none.
    if actions["cast"]:
        counts["cast"] = actions["cast"]
    if actions["graft"]:
        counts["graft"] = actions["graft"]
    if renamed := sum(tensor.to is not None for tensor in tensors):
        counts["rename"] = renamed
    return counts


#: One set for a million tensors, of which pydantic would give each its own, larger than all else that it holds.
_COPIED = set(PlannedTensor.model_fields)


def _copied(name: str, info: TensorInfo, claims: Claims, graft: Graft | None, dtype: str | None) -> PlannedTensor:
    frozen, rule = claims.copied(name)
    return PlannedTensor.model_construct(
        _COPIED,
        name=name,
        action="graft" if graft is not None else "cast" if dtype is not None else "copy",
        frozen=frozen,
        dtype=dtype or info.dtype,
        shape=info.shape,
        rule=rule,
        rows=claims.rows.get(name) if frozen else None,
        donor=None if graft is None else graft.donor,
        donor_name=None if graft is None or graft.name == name else graft.name,
        old_dtype=None if dtype is None else info.dtype,
    )


def _dropped(name: str, info: TensorInfo, rule: str | None) -> PlannedTensor:
    return PlannedTensor(name=name, action="drop", frozen=False, dtype=info.dtype, shape=info.shape, rule=rule)


def _drawn(name: str, old: TensorInfo, spec: Spec, position: int, draws: Draws, claims: Claims) -> PlannedTensor:
    rule, info = spec.reinit[position], draws.shapes[name]
    rows = claims.rows.get(name) if rule.keep and not rule.frozen else None
    if rule.keep:
        claims.check_kept(name, old, info)
    init = draws.resolved(name, info, rule.init, ("reinit", position, "init"), old)
    return PlannedTensor(
        name=name,
        action="reinit",
        frozen=rule.frozen or rows is not None,
        dtype=info.dtype,
        shape=info.shape,
        rule=spec.written(("reinit", position)),
        init=init,
        keep=rule.keep,
        old_shape=old.shape,
        rows=rows,
    )


def _added(findings: Findings, names: Set[str], draws: Draws) -> list[PlannedTensor]:
    """The tensors that the base does not have, of an output that has these names besides."""
    added: dict[str, PlannedTensor] = {}
    for position, rule in enumerate(findings.spec.add):
        place = ("add", position)
        info = TensorInfo(rule.dtype, rule.shape)
        if rule.name in names or rule.name in added:
            owner = "the base has" if rule.name in names else "the spec adds already"
            remedy = "; draw it anew under reinit, or drop it" if rule.name in names else ""
            findings.add((*place, "name"), f'"{shown(rule.name)}" is a tensor that {owner}{remedy}')
        if reason := refused_name(rule.name):
            findings.add((*place, "name"), f'"{shown(rule.name)}" {reason}')
        if rule.init.name == "like":
            findings.add((*place, "init"), "like: an added tensor has no old values; write normal with mean and std")
        if rule.init.name == "mean":
            findings.add((*place, "init"), "mean: an added tensor has no old rows; write another init")
        init = draws.resolved(rule.name, info, rule.init, (*place, "init"))
        added[rule.name] = PlannedTensor(
            name=rule.name,
            action="add",
            frozen=rule.frozen,
            dtype=rule.dtype,
            shape=rule.shape,
            rule=findings.spec.written(place),
            init=init,
        )
    return list(added.values())


def _odd_shapes(output: Sequence[PlannedTensor], base: Mapping[str, TensorInfo]) -> list[str]:
    """A whole list as the shape of a module gives all its tensors that shape."""
    return [
        f"{tensor.rule}: {shown(tensor.name)} changes from {len(base[tensor.name].shape)} to "
        f"{counted(len(tensor.shape), 'dimension')}; {{0: {tensor.shape[0]}}} sets one size and keeps the others"
        for tensor in output
        if tensor.action == "reinit" and tensor.shape and len(tensor.shape) != len(base[tensor.name].shape)
    ][:5]


def _odd_outcomes(output: Sequence[PlannedTensor]) -> list[str]:
    """Outcomes that are allowed, but that few people want."""
    notes = []
    if not any(tensor.frozen for tensor in output):
        notes.append("nothing is frozen: there will be nothing to verify")
    frozen = {tensor.name: tensor.frozen for tensor in output}
    parted = []
    for name in (name for name in frozen if name.endswith("running_mean")):
        module, leaf = module_and_leaf(name)
        if leaf == "running_mean" and frozen.get(f"{module}weight", frozen[name]) != frozen[name]:
            parted.append(name)
    if parted:
        which = "statistics follow the data though their weights are frozen"
        if frozen[parted[0]]:
            which = "statistics are frozen though their weights train"
        notes.append(f"{counted(len(parted), 'norm layer')} half frozen: {which} ({enumerate_names(parted, 2)})")
    return notes
