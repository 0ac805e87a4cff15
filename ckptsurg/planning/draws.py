"""What a spec draws: the new shapes, and the initializers with ``default`` written out."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping

from ..initializer_arguments import Initializer, refusal
from ..parsing import Place
from ..rules import AddRule, ReinitRule
from ..selectors import module_and_leaf
from ..tensors import TensorInfo
from ..wording import enumerate_names, shown
from .findings import Findings

__all__ = ["Draws"]


class Draws:
    """Shapes, dtypes and initializers of the tensors that are drawn."""

    def __init__(
        self,
        findings: Findings,
        left: Mapping[str, TensorInfo],
        owners: Mapping[str, int],
        dtypes: Mapping[str, str],
    ) -> None:
        self._findings, self._owners = findings, owners
        spec = findings.spec
        self.shapes = {
            name: TensorInfo(
                dtypes.get(name, left[name].dtype), self._new_shape(name, left[name], spec.reinit[rule], rule)
            )
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
            from ..defaults import Ambiguous, resolve_default  # here, for it builds initializers of its own

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
        refused: dict[Place, list[str]] = defaultdict(list)
        for (place, _), names in self._refused.items():
            refused[place] += names
        drawn = Counter[Place](("reinit", rule, "init") for rule in self._owners.values())
        # The weights of a rule are drawn so, and their biases have too few dimensions.
        lesser = {
            place
            for place, names in refused.items()
            if len(names) < drawn[place] and all(len(self.shapes[name].shape) < 2 for name in names)
        }
        for (place, reason), names in self._refused.items():
            remedy = "; give it a rule of its own, or write `init: default`" if place in lesser else ""
            self._findings.add(place, f"{enumerate_names(names, 3)}: {reason}{remedy}")
