"""Which rule of a spec has which tensor: what freeze, train and reinit claim, also against one another."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property

from ..rules import ReinitRule
from ..selectors import Space
from ..tensors import TensorInfo
from ..wording import enumerate_names, shown
from .findings import Findings

__all__ = ["Claims"]


class Claims:
    """Which rule has each tensor that is not dropped, and whether it is frozen.

    Attributes:
        owners: The reinit rule of each tensor that is drawn.
    """

    def __init__(self, findings: Findings, space: Space) -> None:
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
