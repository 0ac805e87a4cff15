"""From a spec and the headers of a base to one action for every tensor. Pure: nothing is read, nothing is written."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property

from .errors import Problem, SpecError
from .initializer_arguments import Initializer, refusal
from .layers import from_metadata
from .matching import Names
from .parsing import Place
from .plans import Counts, Plan, PlannedTensor
from .selectors import Selection, Space, module_and_leaf, select
from .spec import AddRule, Item, ReinitRule, Spec
from .tensors import TensorInfo, TensorSource, refused_name
from .wording import counted, enumerate_names, shown

__all__ = ["plan"]


def plan(spec: Spec, source: TensorSource) -> Plan:
    """Give every tensor of the source one fate.

    Raises:
        SpecError: with everything in the spec that does not fit the source.
    """
    base, layers = source.tensors, from_metadata(getattr(source, "metadata", None))
    findings = _Findings(spec)
    space = Space(Names(base, layers), base)
    drop = findings.select(("drop",), spec.drop, space)
    rule_of = findings.rules("drop", drop)
    dropped = {name: rule_of(name) for name in base if name in drop.names}
    left = {name: info for name, info in base.items() if name not in dropped}
    if dropped:
        space = Space(Names(left, layers), left, Names(dropped, layers))

    fates = _Fates(findings, space)
    draws = _Draws(findings, left, fates.owners)
    planned = {name: _copied(name, info, fates) for name, info in left.items() if name not in fates.owners}
    planned |= {name: _drawn(name, left[name], spec, rule, draws, fates) for name, rule in fates.owners.items()}
    planned |= {name: _dropped(name, base[name], rule) for name, rule in dropped.items()}
    added = _added(findings, left, draws)
    draws.report_refusals()
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
    return {
        "copy": actions["copy"],
        "drop": actions["drop"],
        "reinit": actions["reinit"],
        "add": actions["add"],
        "frozen": frozen,
        "trainable": len(tensors) - actions["drop"] - frozen,
    }


class _Findings:
    """What is wrong with a spec, and what is odd about it, gathered over all its rules."""

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        self.problems: list[Problem] = []
        self.notes: list[str] = []

    def add(self, place: Place, message: str) -> None:
        self.problems.append(self.spec.problem(place, message))

    def select(self, place: Place, items: Sequence[Item] | None, space: Space) -> Selection:
        selection = select(self.spec, place, items or (), space)
        self.problems += selection.problems
        self.notes += selection.notes
        return selection

    def claimed_twice(self, names: Sequence[str], one: Place, other: Place, remedy: str) -> None:
        places = f"{self.spec.written(one)} and {self.spec.written(other)}"
        self.add(other, f"{places} both claim {enumerate_names(names, 3)}; {remedy}")

    def rules(self, key: str, selection: Selection) -> Callable[[str], str | None]:
        """Where in the spec a name was decided."""
        written = {position: self.spec.written((key, position)) for position in set(selection.item.values())}
        # What `train` does not name is frozen by the key as a whole.
        as_a_whole = "train" if key == "train" and self.spec.train is not None else None
        return lambda name: written.get(selection.item.get(name, -1), as_a_whole)


class _Fates:
    """Which rule has each tensor that is not dropped, and whether it is frozen.

    Attributes:
        owners: The reinit rule of each tensor that is drawn.
    """

    def __init__(self, findings: _Findings, space: Space) -> None:
        spec = findings.spec
        self._findings, self._space = findings, space
        self._freeze = findings.select(("freeze",), spec.freeze, space)
        self._train = findings.select(("train",), spec.train, space)
        self.owners = self._reinit_owners()
        self._check()

    @cached_property
    def copied(self) -> Callable[[str], tuple[bool, str | None]]:
        """Of a tensor, were it copied: whether it is frozen, and by which rule."""
        spec, frozen, trained = self._findings.spec, self._freeze.names, self._train.names
        if spec.freeze is not None:
            rule_of = self._findings.rules("freeze", self._freeze)
            return lambda name: (name in frozen, rule_of(name))
        rule_of = self._findings.rules("train", self._train)
        return lambda name: (spec.train is not None and name not in trained, rule_of(name))

    def _reinit_owners(self) -> dict[str, int]:
        """Which reinit rule has each tensor that is drawn, in the order of the names."""
        owners: dict[str, int] = {}
        for position, rule in enumerate(self._findings.spec.reinit):
            selected = self._findings.select(("reinit", position), [rule], self._space).names
            claimed = {name: owners[name] for name in self._space.names.in_order(selected & owners.keys())}
            for earlier in sorted(set(claimed.values())):
                both = [name for name, owner in claimed.items() if owner == earlier]
                remedy = "a tensor is drawn by one rule; make a pattern narrower"
                self._findings.claimed_twice(both, ("reinit", earlier), ("reinit", position), remedy)
            owners = dict.fromkeys(selected, position) | owners
        return {name: owners[name] for name in self._space.names.in_order(owners)}

    def _check(self) -> None:
        """Report what freeze, train and reinit claim against one another."""
        spec, freeze, train = self._findings.spec, self._freeze, self._train
        drawn: dict[int, list[str]] = defaultdict(list)
        for name, position in self.owners.items():
            drawn[position].append(name)
        for position, names in drawn.items():
            rule, place = spec.reinit[position], ("reinit", position)
            if rule.frozen and (both := [name for name in names if name in train.names]):
                remedy = f'add "!{shown(rule.match)}" to train, or leave `frozen` out'
                self._findings.claimed_twice(both, ("train", train.item[both[0]]), place, remedy)
            # What has frozen rows, and keeps the old ones, is not drawn where it is frozen.
            kept = freeze.rows if rule.keep else ()
            both = [name for name in names if name in freeze.names and name not in kept]
            if both and not rule.frozen:
                self._findings.claimed_twice(both, ("freeze", freeze.item[both[0]]), place, self._thawed(rule, both))
        if spec.freeze is None or spec.train is None:
            return
        if both := self._space.names.in_order((freeze.names & train.names) - self.owners.keys()):
            held, thawed = freeze.item[both[0]], train.item[both[0]]
            # The wider of the two gives way.
            if len(freeze.names) < len(train.names):
                remedy = f'add "!{shown(spec.freeze[held].match)}" to train'
            else:
                remedy = f'add "!{shown(spec.train[thawed].match)}" to freeze'
            self._findings.claimed_twice(both, ("freeze", held), ("train", thawed), remedy)
        if neither := self._space.names.in_order(
            self._space.tensors.keys() - freeze.names - train.names - self.owners.keys()
        ):
            message = (
                f"in neither freeze nor train: {enumerate_names(neither, 3)}; with both keys every tensor is in one"
            )
            self._findings.add(("train",), message)

    def _thawed(self, rule: ReinitRule, names: Sequence[str]) -> str:
        """How to let a rule draw tensors that freeze claims, or what it draws of them."""
        remedy = f'add "!{shown(rule.match)}" to freeze'
        if not rule.keep:
            return f"add `keep: true` to the rule, or {remedy}" if names[0] in self._freeze.rows else remedy
        counts = {self._space.tensors[name].shape[:1] for name in names}
        if len(counts) != 1 or counts == {()} or not isinstance(rule.shape, dict) or set(rule.shape) != {0}:
            return remedy
        count = min(*counts.pop(), rule.shape[0])
        return f'{remedy}, or {{match: {shown(rule.match)}, rows: "[:{count}]"}} to freeze the old rows alone'

    @property
    def rows(self) -> Mapping[str, tuple[int, int]]:
        """First row and the one after the last, of tensors of which freeze names a part."""
        return self._freeze.rows

    def check_kept(self, name: str, old: TensorInfo, new: TensorInfo) -> None:
        """Report frozen rows that a rule with ``keep`` does not keep."""
        rows = self._freeze.rows.get(name)
        if rows is None or (old.shape[1:] == new.shape[1:] and rows[1] <= new.shape[0]):
            return
        message = f"{shown(name)} goes from {old} to {new}: the frozen rows are not kept whole"
        self._findings.add(("freeze", self._freeze.item[name], "rows"), message)


class _Draws:
    """Shapes and initializers of the tensors that are drawn."""

    def __init__(self, findings: _Findings, left: Mapping[str, TensorInfo], owners: Mapping[str, int]) -> None:
        self._findings = findings
        spec = findings.spec
        self.shapes = {
            name: TensorInfo(left[name].dtype, self._new_shape(name, left[name], spec.reinit[rule], rule))
            for name, rule in owners.items()
        }
        added = {rule.name: TensorInfo(rule.dtype, rule.shape) for rule in spec.add}
        self._refused: dict[tuple[Place, str], list[str]] = defaultdict(list)
        self._modules: dict[str, dict[str, TensorInfo]] = defaultdict(dict)
        rules: tuple[ReinitRule | AddRule, ...] = (*spec.reinit, *spec.add)
        if any(rule.init.name == "default" for rule in rules):
            for name, info in {**left, **self.shapes, **added}.items():
                module, leaf = module_and_leaf(name)
                self._modules[module][leaf] = info

    def _new_shape(self, name: str, old: TensorInfo, rule: ReinitRule, position: int) -> tuple[int, ...]:
        place = ("reinit", position, "shape")
        rank = len(old.shape)
        if rule.shape is None:
            return old.shape
        if isinstance(rule.shape, tuple):
            if rule.keep and len(rule.shape) != rank:
                self._findings.add(
                    place, f"keep: {shown(name)} is {old}; the new shape has {len(rule.shape)} dimensions"
                )
            return rule.shape
        shape = dict(enumerate(old.shape))
        given: set[int] = set()
        for dimension, size in rule.shape.items():
            here = (*place, str(dimension))
            if not -rank <= dimension < rank:
                self._findings.add(here, f"{shown(name)} is {old}: it has no dimension {dimension}")
                continue
            if dimension % rank in given:
                self._findings.add(here, f"{shown(name)} is {old}: dimension {dimension % rank} is given twice")
            given.add(dimension % rank)
            shape[dimension % rank] = size
        return tuple(shape.values())

    def resolved(
        self, name: str, info: TensorInfo, init: Initializer, place: Place, old: TensorInfo | None = None
    ) -> Initializer:
        """The initializer with ``default`` written out; a problem where it cannot draw the tensor."""
        if init.name == "default":
            from .defaults import Ambiguous, resolve_default  # here, for it builds initializers of its own

            module, leaf = module_and_leaf(name)
            owner = init.arguments.get("module") or ("MultiheadAttention" if self._in_attention(module) else None)
            try:
                init = resolve_default(leaf, info, self._modules[module], owner)
            except Ambiguous as error:
                self._findings.add(place, f"{shown(name)} {info}: {error}")
                return init
            if leaf == "num_batches_tracked" and init.name == "zeros":  # an integer, but a counter that begins at zero
                return init
        if reason := refusal(init, info, old):
            self._refused[place, reason].append(name)
        return init

    def _in_attention(self, module: str) -> bool:
        """Whether a module is the projection out of a torch.nn.MultiheadAttention."""
        parent, leaf = module_and_leaf(module[:-1])
        above = self._modules.get(parent, {})
        return leaf == "out_proj" and ("in_proj_weight" in above or "q_proj_weight" in above)

    def report_refusals(self) -> None:
        """Report what cannot be drawn, once for each rule and reason."""
        for (place, reason), names in self._refused.items():
            self._findings.add(place, f"{enumerate_names(names, 3)}: {reason}")


def _copied(name: str, info: TensorInfo, fates: _Fates) -> PlannedTensor:
    frozen, rule = fates.copied(name)
    rows = fates.rows.get(name) if frozen else None
    return PlannedTensor(
        name=name, action="copy", frozen=frozen, dtype=info.dtype, shape=info.shape, rule=rule, rows=rows
    )


def _dropped(name: str, info: TensorInfo, rule: str | None) -> PlannedTensor:
    return PlannedTensor(name=name, action="drop", frozen=False, dtype=info.dtype, shape=info.shape, rule=rule)


def _drawn(name: str, old: TensorInfo, spec: Spec, position: int, draws: _Draws, fates: _Fates) -> PlannedTensor:
    rule, info = spec.reinit[position], draws.shapes[name]
    rows = fates.rows.get(name) if rule.keep and not rule.frozen else None
    if rule.keep:
        fates.check_kept(name, old, info)
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


def _added(findings: _Findings, left: Mapping[str, TensorInfo], draws: _Draws) -> list[PlannedTensor]:
    added: dict[str, PlannedTensor] = {}
    for position, rule in enumerate(findings.spec.add):
        place = ("add", position)
        info = TensorInfo(rule.dtype, rule.shape)
        if rule.name in left or rule.name in added:
            owner = "the base has" if rule.name in left else "the spec adds already"
            remedy = "; draw it anew under reinit, or drop it" if rule.name in left else ""
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
