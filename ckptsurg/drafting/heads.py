"""The head of a model, told from the shapes and names of its tensors.

A head is a layer like torch's Linear (a 1 x 1 convolution too) that stands in none of the numbered blocks and is no
embedding. Two things tell one: a segment of its name says so (fc, head, classifier, score, logits, predictions), and
nothing else in the model takes as many inputs as it has outputs. Of layers of which both hold there has to be one; or
else of those that are called so; or else of those whose outputs nothing takes. Several are not told apart.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..patterns import CHILD_NUMBER, SEPARATOR
from ..selectors import module_and_leaf
from ..tensors import FLOATS, TensorInfo

__all__ = [
    "Head",
    "Heads",
    "find_heads",
    "linear_layers",
    "says_tied",
    "twins_of",
    "vocabularies",
    "width_of_body",
]

_HEAD = re.compile(r"head|classif|logit|predict|^(?:fc\d*|fc_out|scores?|cls|top)$", re.IGNORECASE)
_EMBEDDING = re.compile(r"emb|vocab|^(?:w[tp]e|shared|tok.*|pos.*)$", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Head:
    """A layer like Linear.

    Attributes:
        module: Its name; empty where its tensors have no module.
        tensors: The names of its weight and, where it has one, its bias.
        weight: Dtype and shape of the weight.
        axis: The dimension of the weight along which the outputs are: 0 in torch, the last in Keras.
        reason: What tells that it is a head, in words.
        is_of_tokens: Whether it has an output for each token that an embedding has.
    """

    module: str
    tensors: tuple[str, ...]
    weight: TensorInfo
    axis: int
    reason: str = ""
    is_of_tokens: bool = False

    @property
    def outputs(self) -> int:
        return self.weight.shape[self.axis]

    @property
    def inputs(self) -> int:
        return self.weight.shape[1 if self.axis == 0 else -2]

    @property
    def has_bias(self) -> bool:
        return len(self.tensors) > 1


@dataclass(frozen=True, slots=True)
class Heads:
    """What was found.

    Attributes:
        found: The head; None where it cannot be told.
        candidates: Layers that it may be, where there are several.
        others: Layers that stand in no block, where nothing tells that one is a head.
    """

    found: Head | None
    candidates: Sequence[Head] = ()
    others: Sequence[Head] = ()


def find_heads(tensors: Mapping[str, TensorInfo]) -> Heads:
    """The head of a model with these tensors."""
    taken = _taken(tensors)
    of_tokens = {tensors[name].shape for name in vocabularies(tensors)}
    last = _last_of_sequences(tensors)
    outside = [one for one in linear_layers(tensors) if _stands_alone(one.module, last) and not _is_embedding(one)]
    rated: dict[int, list[Head]] = defaultdict(list)
    for one in outside:
        words = [part for part in SEPARATOR.split(one.module) if not CHILD_NUMBER.fullmatch(part)]
        is_named = any(_HEAD.search(word) for word in words)
        is_last_named = bool(words) and _HEAD.search(words[-1]) is not None
        is_unused = taken[one.outputs] == (one.inputs == one.outputs)  # what it takes itself does not count
        # A lone weight of two dimensions may be that of an Embedding.
        is_linear = one.has_bias or one.axis != 0
        tier = 1 if is_named and is_unused else 2 if is_last_named else 3 if is_unused and is_linear else None
        if tier is not None:
            why = [
                *(["its name says so"] if tier < 3 else []),
                *(["no later layer uses its outputs"] if is_unused else []),
            ]
            is_of_tokens = one.weight.shape in of_tokens
            rated[tier].append(replace(one, reason=", and ".join(why), is_of_tokens=is_of_tokens))
    best = rated[min(rated)] if rated else []
    if len(best) == 1:
        return Heads(best[0])
    return Heads(None, best, () if best else outside)


def linear_layers(tensors: Mapping[str, TensorInfo]) -> Iterator[Head]:
    """The layers that have a weight of two dimensions, or of a 1 x 1 convolution, perhaps a bias, and no more."""
    modules: dict[str, list[str]] = defaultdict(list)
    for name in tensors:
        modules[module_and_leaf(name)[0]].append(name)
    for module, names in modules.items():
        by_leaf = {name[len(module) :]: name for name in names}
        leaf = next((one for one in ("weight", "kernel") if one in by_leaf), "")
        if not leaf or by_leaf.keys() - {leaf, "bias"} or len(by_leaf) != len(names):
            continue
        weight, axis = tensors[by_leaf[leaf]], 0 if leaf == "weight" else -1
        window = weight.shape[2:] if leaf == "weight" else weight.shape[:-2]
        if len(weight.shape) < 2 or set(window) - {1} or weight.dtype not in FLOATS:
            continue
        if "bias" in by_leaf and tensors[by_leaf["bias"]] != TensorInfo(weight.dtype, (weight.shape[axis],)):
            continue
        own = (by_leaf[leaf], by_leaf["bias"]) if "bias" in by_leaf else (by_leaf[leaf],)
        yield Head(module[:-1], own, weight, axis)


def vocabularies(tensors: Mapping[str, TensorInfo]) -> list[str]:
    """The names of the largest tables of embeddings: two dimensions, and a name that says so."""
    tables = [
        name
        for name, info in tensors.items()
        if len(info.shape) == 2 and any(_EMBEDDING.search(part) for part in SEPARATOR.split(name)[-2:])
    ]
    most = max((tensors[name].shape[0] for name in tables), default=0)
    return [name for name in tables if tensors[name].shape[0] == most]


def says_tied(config: Mapping[str, Any] | None) -> bool:
    """Whether config.json, or a part of it, says that a head that predicts tokens is tied to the embeddings."""
    parts = [config or {}, *(value for value in (config or {}).values() if isinstance(value, dict))]
    return any(part.get("tie_word_embeddings") is True for part in parts)


def twins_of(head: Head, tensors: Mapping[str, TensorInfo]) -> set[str]:
    """The names of a head's weight and of the embeddings that have its shape; none where none have."""
    twins = {name for name in vocabularies(tensors) if tensors[name].shape == head.weight.shape}
    return twins | {head.tensors[0]} if twins else set()


def width_of_body(tensors: Mapping[str, TensorInfo]) -> TensorInfo | None:
    """How many features come out of a body, shape [features], where its norms outside the blocks agree on that."""
    norms = {
        info
        for name, info in tensors.items()
        if len(info.shape) == 1 and info.dtype in FLOATS and module_and_leaf(name)[1] in ("weight", "gamma")
        if not _is_in_block(module_and_leaf(name)[0])
    }
    return norms.pop() if len(norms) == 1 else None


def _is_in_block(module: str) -> bool:
    """Whether a module stands in a numbered one."""
    return any(CHILD_NUMBER.fullmatch(part) for part in SEPARATOR.split(module)[:-1])


def _is_embedding(one: Head) -> bool:
    return _EMBEDDING.search(SEPARATOR.split(one.module)[-1]) is not None


def _last_of_sequences(tensors: Mapping[str, TensorInfo]) -> Mapping[str, int]:
    """The highest number of the children of each module that stands in no numbered one, by the module's name."""
    last: dict[str, int] = {}
    for name in tensors:
        module = module_and_leaf(name)[0][:-1]
        above, number = module_and_leaf(module)
        if CHILD_NUMBER.fullmatch(number):
            last[above] = max(last.get(above, 0), int(number))
    return last


def _stands_alone(module: str, last: Mapping[str, int]) -> bool:
    """Whether a layer stands in no numbered block; the last of a sequence of layers does not."""
    above, number = module_and_leaf(module)
    return not _is_in_block(module) and (not CHILD_NUMBER.fullmatch(number) or int(number) == last[above])


def _taken(tensors: Mapping[str, TensorInfo]) -> Counter[int]:
    """How many tensors take inputs of each size."""
    taken: Counter[int] = Counter()
    for name, info in tensors.items():
        leaf = module_and_leaf(name)[1]
        if len(info.shape) >= 2:
            taken[info.shape[-2 if leaf == "kernel" else 1]] += 1
        elif info.shape and leaf != "bias":  # of a norm
            taken[info.shape[0]] += 1
    return taken
