"""Quantised weights: tensors that mean nothing without one another, and so have one fate."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping

from ..parsing import Place
from ..plans import PlannedTensor
from ..selectors import module_and_leaf
from ..spec import Spec
from ..tensors import FLOATS
from ..wording import shown

__all__ = ["groups", "parted_group"]

#: What is beside a quantised weight, by the end of its name: FP8 of DeepSeek and torchao, compressed-tensors, MXFP4.
_BESIDE = re.compile(
    r"(.+)_(?:scale_inv|scales?|scale_[0-9]|zero_points?|zeros|blocks|packed|g_idx|global_scale|absmax|codebook)"
)
#: The state of bitsandbytes lies below its weight.
_STATE = re.compile(r"(.+)[./](?:(?:nested_)?absmax|(?:nested_)?quant_map|quant_state[./].+)", re.DOTALL)
#: What a module of GPTQ or AWQ holds.
_PACKED = frozenset(("qweight", "qzeros", "scales", "g_idx"))


def groups(names: Iterable[str]) -> Iterator[list[str]]:
    """Tensors that belong together: a weight, its scales, zero points and state."""
    modules: dict[str, list[str]] = defaultdict(list)
    known = dict.fromkeys(names)
    for name in known:
        module, leaf = module_and_leaf(name)
        if (state := _STATE.fullmatch(name)) is not None and state[1] in known:
            modules[state[1]].append(name)
        elif leaf in _PACKED:
            modules[f"{module}qweight"].append(name)
        elif (found := _BESIDE.fullmatch(leaf)) is not None:
            modules[module + found[1]].append(name)
    for weight, parts in modules.items():
        together = [weight, *parts] if weight in known and weight not in parts else parts
        if len(together) > 1:
            yield together


def parted_group(spec: Spec, planned: Mapping[str, PlannedTensor]) -> tuple[Place, str] | None:
    """Where a spec gives the parts of one weight two fates, and what to say of it; of several the first."""
    if len({(one.action, one.frozen, one.old_dtype is None) for one in planned.values()}) == 1:
        return None  # nothing is parted from anything
    for names in groups(planned):
        fates = {name: _fate(planned[name]) for name in names}
        if all(planned[name].dtype in FLOATS and planned[name].old_dtype is None for name in names):
            continue  # nothing in it is quantised
        if len(set(fates.values())) == 1:
            continue
        one, other = names[0], next((name for name in names if fates[name] != fates[names[0]]), names[-1])
        ruled = next((name for name in (other, one) if planned[name].rule is not None), None)
        place = spec.place_of(planned[ruled].rule or "") if ruled is not None else ()
        what = f"{shown(one)} is {fates[one]}, and {shown(other)} is {fates[other]}"
        return place, f"{what}: one is nothing without the other"
    return None


def _fate(tensor: PlannedTensor) -> str:
    if tensor.old_dtype is not None:
        return "cast"
    did = {"copy": "copied", "drop": "dropped", "reinit": "drawn", "graft": "grafted"}.get(tensor.action, tensor.action)
    if tensor.action == "drop":
        return did
    return f"{did} and frozen" if tensor.frozen else f"{did} and trains"
