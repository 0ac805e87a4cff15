"""Where a folder's config.json does not say what its tensors are, and the edit by which it would.

No family of models is named here. A key is taken to speak of what it agreed with in the base: of the stack that had as
many blocks, of the embeddings that had as many rows. What a model's own code leaves out of config.json is not known.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, TypeAlias

from .patterns import CHILD_NUMBER, numbers_below, split_name
from .tensors import TensorInfo
from .wording import quoted, shown

__all__ = ["disagreements", "edits"]

_BLOCKS = re.compile(r"(?:num_|n_)?(?:(?:hidden|encoder|decoder|text|vision)_)*(?:layers?|blocks)|depth")
_EXPERTS = re.compile(r"(?:num_|n_)(?:local_|routed_)?experts|moe_num_experts")
_ROWS = re.compile(r"(?:.*_)?vocab_size")
_EMBEDDINGS = re.compile(
    r"(?:embed_tokens|wte|word_embeddings|tok_embeddings|embed_in|shared|token_embedding|lm_head|embed_out)\.weight$"
)
_HEADS = re.compile(r"(?:^|[./])(?:lm_head|embed_out)\.weight$")
#: The last part of a classifier, which has a row for each label.
_LABELS = re.compile(r"(?:^|[./])(?:classifier|score|head|fc)(?:[./](?:[0-9]+|out_proj|out))*[./]weight$")
#: How many blocks at the end of a stack predict further tokens; the number of layers leaves them out.
_FURTHER = "num_nextn_predict_layers"
_PLAIN = frozenset(("vocab_size", "num_hidden_layers", "num_layers", "n_layer"))
_WITH_HEAD = ("ForCausalLM", "LMHeadModel")
#: How many labels a config.json means that says nothing of them.
_DEFAULT_LABELS = 2
#: How far down objects are looked into.
_DEEPEST = 3


#: The numbers of children, by what leads to their module.
_Children: TypeAlias = Mapping[tuple[str, ...], set[int]]


@dataclass(frozen=True, slots=True)
class _Fact:
    """A number that tensors show, and that a config may say.

    Attributes:
        what: In words.
        before: In the base.
        after: In the output.
        kept: Of a stack: which of its blocks are left, by their place in the base.
        is_experts: Whether the blocks are experts.
    """

    what: str
    before: int
    after: int
    kept: Sequence[int] = ()
    is_experts: bool = False


@dataclass(frozen=True, slots=True)
class _Mismatch:
    """A key that speaks of something else than the output's tensors show.

    Attributes:
        said: What config.json says, in words.
        shown_by: What the tensors show, in words.
        path: The key.
        value: What it would have to be.
    """

    said: str
    shown_by: str
    path: str
    value: Any

    @property
    def note(self) -> str:
        return _note(self.said, self.shown_by, f"set: {{{shown(self.path)}: {shown(json.dumps(self.value), 4000)}}}")


def disagreements(
    config: Mapping[str, Any],
    edited: Mapping[str, Any],
    base: Mapping[str, TensorInfo],
    output: Mapping[str, tuple[str, TensorInfo]],
    dropped: Mapping[str, str] = MappingProxyType({}),
) -> list[str]:
    """What an edited config.json says of an output that its tensors do not show.

    Args:
        config: The base's config.json.
        edited: The output's.
        base: The tensors of the base.
        output: Those of the output by name: each with the base's name of it, or an empty one, and dtype and shape.
        dropped: The pattern that drops each tensor which the output does not have.

    Returns:
        A note on each, with the edit that would mend it.
    """
    infos = {name: info for name, (_, info) in output.items()}
    notes = [one.note for one in _mismatches(config, edited, base, output)]
    gaps = _gaps(_children(base), infos, dropped)
    return [*notes, *gaps, *_labels(edited, infos), *_ties(edited, infos, output)]


def edits(
    config: Mapping[str, Any], base: Mapping[str, TensorInfo], output: Mapping[str, tuple[str, TensorInfo]]
) -> dict[str, Any]:
    """What keys of config.json have to be that say how many blocks, experts or rows there are; arguments as above."""
    return {one.path: one.value for one in _mismatches(config, config, base, output)}


def _mismatches(
    config: Mapping[str, Any],
    edited: Mapping[str, Any],
    base: Mapping[str, TensorInfo],
    output: Mapping[str, tuple[str, TensorInfo]],
) -> Iterator[_Mismatch]:
    facts = list(_stacks(_children(base), _children(old for old, _ in output.values())))
    blocks, further = _parts([fact for fact in facts if not fact.is_experts], config)
    facts_of = {
        _BLOCKS: blocks,
        re.compile(_FURTHER): further,
        _EXPERTS: [fact for fact in facts if fact.is_experts],
        _ROWS: list(_rows(base, output)),
    }
    for path, value in _entries(config):
        now = _at(edited, path)
        if type(value) is int and now is not _ABSENT:
            meant = next((facts for keys, facts in facts_of.items() if keys.fullmatch(path[-1])), [])
            yield from _number(".".join(path), value, now, meant)
        elif isinstance(value, list) and len(value) > 1 and now == value:
            yield from _list(".".join(path), value, facts_of[_BLOCKS])


def _note(said: str, shown_by: str, edit: str) -> str:
    return f"config.json says {said}, and {shown_by}; config: {{{edit}}}"


_ABSENT = object()


def _entries(config: Mapping[str, Any], above: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Keys as paths, those of objects in it too, and their values."""
    for key, value in config.items():
        yield (*above, key), value
        if isinstance(value, dict) and len(above) < _DEEPEST:
            yield from _entries(value, (*above, key))


def _at(config: Any, path: Iterable[str]) -> Any:
    for key in path:
        if not isinstance(config, dict) or key not in config:
            return _ABSENT
        config = config[key]
    return config


def _stacks(before: _Children, after: _Children) -> Iterator[_Fact]:
    """Numbered blocks of modules that are in no block themselves; and experts, as in the first block that has any."""
    has_experts = False
    for above, numbers in before.items():
        is_experts = above[-1] == "experts"
        if is_experts and (has_experts or above not in after):
            continue
        if not is_experts and any(CHILD_NUMBER.fullmatch(segment) for segment in above):
            continue
        has_experts |= is_experts
        places = {number: place for place, number in enumerate(sorted(numbers))}
        kept = [places[number] for number in sorted(after.get(above, ()))]
        what = f"{shown('.'.join(above))} has {len(kept)} {'experts' if is_experts else 'blocks'}"
        yield _Fact(what, len(numbers), len(kept), kept, is_experts)


def _parts(stacks: Iterable[_Fact], config: Mapping[str, Any]) -> tuple[list[_Fact], list[_Fact]]:
    """What the number of layers speaks of, and what that of blocks at the end does which it leaves out."""
    blocks: list[_Fact] = []
    further: list[_Fact] = []
    counted = [
        (_at(config, (*path[:-1], "num_hidden_layers")), n) for path, n in _entries(config) if path[-1] == _FURTHER
    ]
    for stack in stacks:
        first = next((first for first, count in counted if type(count) is int and first == stack.before - count), None)
        if first is None:
            blocks.append(stack)
            continue
        kept = [place for place in stack.kept if place < first]
        blocks.append(replace(stack, before=first, after=len(kept), kept=kept))
        further.append(replace(stack, before=stack.before - first, after=stack.after - len(kept)))
    return blocks, further


def _children(names: Iterable[str]) -> _Children:
    """The numbered children of modules."""
    return {above: set(map(int, numbers)) for above, numbers in numbers_below(names).items() if above}


def _rows(base: Mapping[str, TensorInfo], output: Mapping[str, tuple[str, TensorInfo]]) -> Iterator[_Fact]:
    """Rows of embeddings, and of heads that speak of the same vocabulary."""
    for name, (old, info) in output.items():
        if _EMBEDDINGS.search(name) and old in base and len(info.shape) == len(base[old].shape) == 2:
            yield _Fact(f"{shown(name)} has {info.shape[0]:,} rows", base[old].shape[0], info.shape[0])


def _number(path: str, value: int, now: Any, facts: Sequence[_Fact]) -> Iterator[_Mismatch]:
    meant = [fact for fact in facts if fact.before == value]
    if not meant and len(facts) == 1 and path in _PLAIN:
        meant = list(facts)  # nothing agreed in the base, and there is nothing else that it could speak of
    if meant and all(fact.after != now for fact in meant):
        yield _Mismatch(f"{shown(path)} {quoted(now)}", meant[0].what, path, meant[0].after)


def _list(path: str, value: Sequence[Any], stacks: Sequence[_Fact]) -> Iterator[_Mismatch]:
    """A list with an item for each block, such as ``layer_types``, goes on without those of blocks that are gone."""
    for fact in stacks:
        left = [value[place] for place in fact.kept if place < len(value)]
        if fact.before == len(value) > len(left):
            yield _Mismatch(f"{shown(path)} of {len(value)} items", fact.what, path, left)
            return


def _gaps(before: _Children, output: Mapping[str, TensorInfo], dropped: Mapping[str, str]) -> list[str]:
    """Numbers that are missing: a model that is built of config.json counts its blocks from 0."""
    for above, numbers in _children(output).items():
        expected = range(len(numbers))
        if above in before and before[above] == set(range(len(before[above]))) and numbers != set(expected):
            missing = next(number for number in expected if number not in numbers)
            what = f"{shown('.'.join(above))} has no {missing}, and goes on to {max(numbers)}"
            gone = (*above, str(missing))
            by = (pattern for name, pattern in dropped.items() if tuple(split_name(name)[: len(gone)]) == gone)
            pattern = quoted(next(by, "..."), 200)
            why = "a model counts its blocks from 0, so that the folder does not load whole"
            return [f"{what}: {why}; drop: {{match: {pattern}, renumber: true}}"]
    return []


def _labels(config: Mapping[str, Any], output: Mapping[str, TensorInfo]) -> list[str]:
    architectures = config.get("architectures")
    if not isinstance(architectures, list) or not any(str(one).endswith("Classification") for one in architectures):
        return []
    heads = [name for name, info in output.items() if _LABELS.search(name) and len(info.shape) == 2]
    if not heads:
        return []
    rows, names = output[heads[-1]].shape[0], config.get("id2label")
    count = len(names) if isinstance(names, dict) else _DEFAULT_LABELS
    if config.get("num_labels", count) == rows and (count == rows or not isinstance(names, dict)):
        return []
    said = f"num_labels {quoted(config['num_labels'])}" if "num_labels" in config else f"{count} labels"
    gone = [key for key in ("id2label", "label2id") if key in config]
    unset = f", unset: [{', '.join(gone)}]" if gone else ""
    return [_note(said, f"{shown(heads[-1])} has {rows:,} rows", f"set: {{num_labels: {rows}}}{unset}")]


def _ties(
    config: Mapping[str, Any], infos: Mapping[str, TensorInfo], output: Mapping[str, tuple[str, TensorInfo]]
) -> list[str]:
    """A model that ties its head to its embeddings leaves a head of its own aside; one that does not, lacks it."""
    heads = [name for name in infos if _HEADS.search(name)]
    embeddings = [name for name in infos if _EMBEDDINGS.search(name) and name not in heads]
    tied, architectures = config.get("tie_word_embeddings"), config.get("architectures")
    if tied is True and heads and embeddings:
        head = next((name for name in heads if not output[name][0]), heads[0])
        if not output[head][0] or infos[head].shape != infos[embeddings[0]].shape:
            what = f"{shown(head)} would be left aside for {shown(embeddings[0])}"
            return [_note("tie_word_embeddings true", what, "set: {tie_word_embeddings: false}")]
    has_head = isinstance(architectures, list) and any(str(one).endswith(_WITH_HEAD) for one in architectures)
    if tied is False and embeddings and not heads and has_head:
        return [_note("tie_word_embeddings false", "there is no head", "set: {tie_word_embeddings: true}")]
    return []
