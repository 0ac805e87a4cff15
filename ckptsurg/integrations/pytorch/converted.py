"""A live model of transformers as its checkpoint has it: under other names, and cut differently.

Transformers converts weights while it loads them, and takes that back when it saves. What it would save is asked of it
on tensors without memory; real ones are moved when a part is split, one part at a time.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._pytree import tree_leaves

from ...errors import FreezeError
from ...frameworks.pytorch import without_memory
from ...wording import shown
from .parts import Part

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["parts_as_saved"]


def parts_as_saved(model: PreTrainedModel, live: Mapping[str, torch.Tensor], wanted: Collection[str]) -> list[Part]:
    """What of a live model stands for what of its checkpoint.

    Args:
        model: The model.
        live: Its tensors by qualified name; a tied one under each of its names.
        wanted: Names in the checkpoint.

    Returns:
        Every live tensor in one part. Saved names that are not wanted are those that transformers would give.

    Raises:
        FreezeError: if transformers cannot take back how it converted the weights.
    """
    groups = _groups(model, live)
    known = set(live) if groups is None else {name for group in groups for name in group.saved}
    missing = [name for name in wanted if name not in known]
    if groups is None and not missing:
        return [Part((name,), (name,)) for name in live]
    if groups is None:
        groups = [_Group((name,), (name,), as_is=True) for name in live]
    called: dict[str, str] = {}
    if missing:
        groups, called = _called_as_wanted(model, groups, live, frozenset(wanted), missing)
    position = {name: number for number, name in enumerate(live)}
    groups.sort(key=lambda group: position[group.live[0]])
    return [_part(model, group, called) for group in groups]


@dataclass(frozen=True, slots=True)
class _Group:
    """Live tensors, and what transformers saves of them.

    Attributes:
        live: Names in the model, in its order.
        saved: Names that transformers gives.
        as_is: Whether it is one tensor, and only renamed.
    """

    live: tuple[str, ...]
    saved: tuple[str, ...]
    as_is: bool = False


def _part(model: PreTrainedModel, group: _Group, called: Mapping[str, str]) -> Part:
    names = {name: called.get(name, name) for name in group.saved}
    if group.as_is:
        return Part(group.live, tuple(names.values()))
    return Part(group.live, tuple(names.values()), partial(_split, model, group.live, names))


def _split(
    model: PreTrainedModel, live: Iterable[str], names: Mapping[str, str], tensors: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    saved = _reverted(model, {name: tensors[name].detach().contiguous() for name in live})
    return {new: saved[name] for name, new in names.items()}


# --- What transformers would save -------------------------------------------------------------------


#: Functions of torch that bring the same bits to another place.
_MOVES = {
    "__get__", "__getitem__", "cat", "chunk", "clone", "concat", "contiguous", "detach", "flatten", "flip",
    "index_select", "movedim", "narrow", "permute", "reshape", "roll", "select", "split", "split_with_sizes", "squeeze",
    "stack", "swapaxes", "tensor_split", "transpose", "unbind", "unflatten", "unsqueeze", "view", "view_as",
}  # fmt: skip


class _Traced(torch.Tensor):
    """A tensor that knows which live ones it is made of, and whether it only has their bits."""

    made_of: frozenset[str] = frozenset()
    moved: bool = True

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, _Traced)]
        for leaf in tree_leaves(result):
            if isinstance(leaf, _Traced):
                leaf.made_of = frozenset().union(*(one.made_of for one in given))
                leaf.moved = func.__name__ in _MOVES and all(one.moved for one in given)
        return result


def _groups(model: PreTrainedModel, live: Mapping[str, torch.Tensor]) -> list[_Group] | None:
    """What transformers saves of what; None where it saves the live tensors."""
    if getattr(model, "_weight_conversions", None) == []:  # loaded, and nothing was converted
        return None
    twins: dict[str, torch.Tensor] = {}
    for name, tensor in live.items():
        twins[name] = twin = without_memory(tensor).as_subclass(_Traced)
        twin.made_of = frozenset((name,))
    try:
        saved = _reverted(model, twins)
    except Exception as failure:  # whatever a conversion meets
        reason = shown(failure) or type(failure).__name__
        raise _refused(model, f"cannot take back how it converted the weights: {reason}") from failure
    if saved is twins:
        return None
    # Values that are rounded again would hide that those in the model have changed.
    if computed := [name for name, tensor in saved.items() if not getattr(tensor, "moved", True)]:
        raise _refused(model, f'saves "{shown(computed[0])}" computed anew, not with the bits in the model')
    groups = list(_connected(live, {name: getattr(tensor, "made_of", ()) for name, tensor in saved.items()}))
    as_is = [_Group(g.live, g.saved, as_is=True) for g in groups if _is_renamed(g, twins, saved)]
    converted = [group for group in groups if not _is_renamed(group, twins, saved)]
    lost = live.keys() - {name for group in groups for name in group.live}
    if overwritten := sorted(lost & saved.keys()):
        raise _refused(model, f'saves another tensor as "{shown(overwritten[0])}", and not the one of that name')
    # Of names that become one, such as those of tied tensors, transformers saves one.
    as_is += [_Group((name,), (name,), as_is=True) for name in lost]
    return as_is + _separable(model, converted, live, saved)


def _refused(model: PreTrainedModel, what: str) -> FreezeError:
    quantised = getattr(model, "hf_quantizer", None) is not None
    return FreezeError(
        f"the model ({type(model).__name__}) cannot be compared with its checkpoint: transformers {what}",
        hint="load the weights as they were published, without quantisation" if quantised else "give `names`",
    )


def _reverted(model: PreTrainedModel, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    from transformers.core_model_loading import revert_weight_conversion

    saved: dict[str, torch.Tensor] = revert_weight_conversion(model, tensors)
    return saved


def _is_renamed(group: _Group, twins: Mapping[str, torch.Tensor], saved: Mapping[str, torch.Tensor]) -> bool:
    return len(group.live) == len(group.saved) == 1 and saved[group.saved[0]] is twins[group.live[0]]


def _connected(live: Iterable[str], made_of: Mapping[str, Collection[str]]) -> list[_Group]:
    """The smallest groups such that nothing saved is made of two of them."""
    sources: dict[str, set[str]] = {}  # of each live name, all that are in its group
    for some in set(map(frozenset, made_of.values())):
        joined = set(some).union(*(sources.get(name, ()) for name in some))
        sources.update(dict.fromkeys(joined, joined))
    saved_of: dict[int, list[str]] = defaultdict(list)
    for name, names in made_of.items():
        if names:
            saved_of[id(sources[next(iter(names))])].append(name)
    live_of: dict[int, list[str]] = defaultdict(list)
    for name in live:
        if name in sources:
            live_of[id(sources[name])].append(name)
    return [_Group(tuple(live_of[key]), tuple(names)) for key, names in saved_of.items()]


def _separable(
    model: PreTrainedModel, groups: list[_Group], live: Mapping[str, torch.Tensor], saved: Mapping[str, torch.Tensor]
) -> list[_Group]:
    """Groups that come out alone as they do with all others; those that do not are joined."""

    def holds(group: _Group) -> bool:
        try:
            alone = _reverted(model, {name: without_memory(live[name]) for name in group.live})
        except Exception:  # a conversion that wants more than its own tensors
            return False
        return alone.keys() == set(group.saved) and all(alone[name].shape == saved[name].shape for name in group.saved)

    found: list[_Group] = []
    places: list[Callable[[_Group], Hashable]] = [
        lambda group: group.live,
        lambda group: _block(group.live[0]),
        lambda group: None,
    ]
    for place in places:
        together: dict[Hashable, list[_Group]] = defaultdict(list)
        for group in groups:
            together[place(group)].append(group)
        groups = []
        for some in together.values():
            names = {name for group in some for name in group.live}
            joined = _Group(
                tuple(name for name in live if name in names) if len(some) > 1 else some[0].live,
                tuple(name for group in some for name in group.saved),
            )
            (found if holds(joined) else groups).append(joined)
        if not groups:
            return found
    raise _refused(model, f'takes the conversion of "{shown(groups[0].live[0])}" back only with the whole model')


def _block(name: str) -> str:
    """A name up to its last number, such as that of a layer."""
    segments = name.split(".")
    while segments and not segments[-1].isdigit():
        segments.pop()
    return ".".join(segments)


# --- Other names for the same -----------------------------------------------------------------------


def _called_as_wanted(
    model: PreTrainedModel,
    groups: list[_Group],
    live: Mapping[str, torch.Tensor],
    wanted: Collection[str],
    missing: Iterable[str],
) -> tuple[list[_Group], dict[str, str]]:
    """Groups that fit the wanted names, and what to call their saved names.

    Transformers loads more than it saves: files with and without the prefix of the base model, with names that it has
    given up, or with the names of the live model. Where a missing name would be loaded to tells what it is.
    """
    from transformers import core_model_loading
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping, get_model_conversion_mapping

    transforms = get_model_conversion_mapping(model)
    converters = [one for one in transforms if isinstance(one, core_model_loading.WeightConverter)]
    renamings = [one for one in transforms if isinstance(one, core_model_loading.WeightRenaming)]
    # These are not taken back where it is not known whether they were needed.
    prefixes = [one for one in renamings if isinstance(one, getattr(core_model_loading, "PrefixChange", ()))]
    one_way = [*prefixes, *get_checkpoint_conversion_mapping("legacy")]  # type: ignore[no-untyped-call]
    base = model.base_model_prefix or None
    rename = core_model_loading.rename_source_key

    loaded = dict(live)
    with_live = {name: group for group in groups for name in group.live}
    with_saved = {name: group for group in groups for name in group.saved}
    claims: dict[str, list[str]] = defaultdict(list)  # wanted names by the saved name that they stand for
    live_claims: dict[str, list[str]] = defaultdict(list)  # by the live name, of a file that is cut like the model
    for name in missing:
        called, _ = rename(name, [], [], base, with_saved)
        if called not in with_saved:
            called, _ = rename(name, one_way, [], base, with_saved)
        if called in with_saved:
            claims[called].append(name)
            continue
        called, converter = rename(name, renamings, converters, base, loaded)
        if called not in loaded:
            called, converter = rename(name, [], [], base, loaded)
        group = with_live.get(called)
        if group is None:
            continue
        if converter is None and not group.as_is:
            live_claims[called].append(name)
        elif len(group.saved) == 1:
            claims[group.saved[0]].append(name)

    names = {old: new[0] for old, new in claims.items() if len(new) == 1 and old not in wanted}
    live_names = {old: new[0] for old, new in live_claims.items() if len(new) == 1}
    fitting: list[_Group] = []
    for group in groups:
        as_saved = any(name in wanted or name in names for name in group.saved)
        if not as_saved and any(name in live_names for name in group.live):
            fitting += [_Group((name,), (live_names.get(name, name),), as_is=True) for name in group.live]
        else:
            fitting.append(group)
    return fitting, names
