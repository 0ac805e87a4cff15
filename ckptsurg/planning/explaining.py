"""Why a tensor has its fate: which patterns of a spec take it, and which give it away."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from ..documents import Model, is_none
from ..errors import UsageError
from ..layers import from_metadata
from ..matching import Names
from ..patterns import PatternError
from ..plans import Plan, PlannedTensor
from ..rules import Item
from ..selectors import Space
from ..spec import RULES, Spec
from ..tensors import TensorSource
from ..wording import closest, shown

__all__ = ["Explanation", "Reason", "explain"]


class Reason(Model):
    """What one pattern does with a tensor.

    Attributes:
        rule: Where in the spec it stands.
        pattern: The pattern, or the name of an added tensor.
        does: Whether it takes the tensor, gives it away, or matches it and is left aside by its ``where``.
        decides: Whether that is what counts: of a list the last one does.
    """

    rule: str
    pattern: str
    does: Literal["takes", "gives away", "filters out"]
    decides: bool


class Explanation(Model):
    """Why a tensor has its fate.

    Attributes:
        version: Of this document's form.
        tensor: What becomes of it.
        reasons: The patterns that match it, in the order of the spec.
        also: Of a name in the base that the output gives to another tensor: why that one has its fate.
    """

    version: Literal[1] = 1
    tensor: PlannedTensor
    reasons: tuple[Reason, ...]
    also: Explanation | None = Field(default=None, exclude_if=is_none)

    def to_json(self) -> str:
        return self.model_dump_json(indent=1, ensure_ascii=True, by_alias=True)


def explain(spec: Spec, source: TensorSource, plan: Plan, name: str) -> Explanation:
    """Why a tensor has its fate.

    Args:
        spec: The spec.
        source: The base.
        plan: The plan that was made of the two.
        name: Of the tensor, in the base or in the output; where these are two, both are explained.

    Raises:
        UsageError: if there is no such tensor.
    """
    before = {tensor.name: tensor for tensor in plan.tensors if tensor.action != "add"}
    after = {tensor.output_name: tensor for tensor in plan.output}
    found = [tensors[name] for tensors in (before, after) if name in tensors]
    if not found:
        near = [shown(one) for one in closest(name, before | after)]
        hint = f"nearest: {', '.join(near)}" if near else "`ckptsurg inspect CKPT` shows the names"
        raise UsageError(f'{source.label}: has no tensor "{shown(name)}"', hint=hint)
    explained = [_explained(spec, source, plan, tensor) for tensor in found]
    also = explained[-1] if found[0] is not found[-1] else None
    return explained[0].model_copy(update={"also": also})


def _explained(spec: Spec, source: TensorSource, plan: Plan, tensor: PlannedTensor) -> Explanation:
    if tensor.action == "add":
        added = [Reason(rule=tensor.rule or "add", pattern=tensor.name, does="takes", decides=True)]
        return Explanation(tensor=tensor, reasons=tuple(added))
    layers = from_metadata(getattr(source, "metadata", None))
    base = source.tensors
    left = {one.name: base[one.name] for one in plan.tensors if one.action not in ("drop", "add")}
    whole = Space(Names(base, layers), base)
    rest = Space(whole.names.part(left), left)
    reasons: list[Reason] = []
    for key in RULES:
        if key != "drop" and tensor.action == "drop":
            continue
        found = list(_reasons(spec, key, whole if key == "drop" else rest, tensor.name))
        if key in ("drop", "freeze", "train", "cast"):  # of a list the last that does anything decides
            last = next((number for number in reversed(range(len(found))) if found[number].does != "filters out"), None)
            found = [one.model_copy(update={"decides": number == last}) for number, one in enumerate(found)]
        reasons += found
    return Explanation(tensor=tensor, reasons=tuple(reasons))


def _reasons(spec: Spec, key: str, space: Space, name: str) -> Iterator[Reason]:
    for position, item in enumerate(getattr(spec, key) or ()):
        if (does := _does(item, space, name)) is not None:
            rule = spec.written((key, position))
            yield Reason(rule=rule, pattern=item.match, does=does, decides=does != "filters out")


def _does(item: Item, space: Space, name: str) -> Literal["takes", "gives away", "filters out"] | None:
    negative = item.match.startswith("!") and item.match not in space.tensors
    try:
        hits = space.names.match(item.match[1:] if negative else item.match)
    except PatternError:
        return None
    if not any(name in names for _, names in hits):
        return None
    if item.where is not None and not space.keeps(name, item.where):
        return "filters out"
    return "gives away" if negative else "takes"
