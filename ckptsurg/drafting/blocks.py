"""What is numbered in a model: stacks of blocks (``model.layers.0``), and stages (``layer1`` to ``layer4``)."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..patterns import CHILD_NUMBER
from ..tensors import TensorInfo
from ..trees import Module, Tree

__all__ = ["Stack", "Stages", "find_stacks", "find_stages"]

_STAGE = re.compile(r"(.*[^0-9./])([1-9]?[0-9])")
#: How many segments into names it is looked for blocks.
_DEEPEST = 64


@dataclass(frozen=True, slots=True)
class Stack:
    """A module whose children are blocks.

    Attributes:
        path: Its name.
        count: How many blocks it has, numbered without gaps.
        elements: Of all tensors in it.
        alike: How many blocks at the end have the same tensors as the one before them.
    """

    path: str
    count: int
    elements: int
    alike: int


@dataclass(frozen=True, slots=True)
class Stages:
    """Modules beside one another that have numbers in their names.

    Attributes:
        stem: What stands before the number.
        numbers: The numbers, sorted.
        elements: Of all tensors in them.
    """

    stem: str
    numbers: Sequence[int]
    elements: int


def find_stacks(tensors: Mapping[str, TensorInfo]) -> list[Stack]:
    """The stacks that stand in no block themselves, the largest first. A sequence of mere layers is none."""
    tree = Tree(tensors)
    found = []
    for path, module in _outer_modules(tree):
        numbers = sorted(int(key) for key in module.modules if CHILD_NUMBER.fullmatch(key))
        if len(numbers) < 2 or numbers[-1] - numbers[0] + 1 != len(numbers):
            continue
        blocks = [module.modules[str(number)] for number in numbers]
        if all(block.modules for block in blocks):
            elements = sum(tensors[name].elements for name in tree.names_below([module]))
            found.append(Stack(path, len(blocks), elements, _alike(blocks, tree, tensors)))
    return sorted(found, key=lambda stack: -stack.elements)


def find_stages(tensors: Mapping[str, TensorInfo]) -> list[Stages]:
    """The stages that stand in no block, the largest first."""
    tree = Tree(tensors)
    groups: dict[str, dict[int, int]] = defaultdict(dict)
    for path, module in _outer_modules(tree):
        if matched := _STAGE.fullmatch(path):
            elements = sum(tensors[name].elements for name in tree.names_below([module]))
            groups[matched[1]][int(matched[2])] = elements
    found = [Stages(stem, sorted(sizes), sum(sizes.values())) for stem, sizes in groups.items() if len(sizes) > 1]
    return sorted(found, key=lambda stages: -stages.elements)


def _outer_modules(tree: Tree) -> list[tuple[str, Module]]:
    """The modules that stand in no numbered one, by their names."""
    pending, found = [tree.root], []
    while pending:
        module = pending.pop()
        found.append((tree.path(module), module))
        if module.depth < _DEEPEST:
            pending += [one for key, one in reversed(module.modules.items()) if not CHILD_NUMBER.fullmatch(key)]
    return found


def _alike(blocks: Sequence[Module], tree: Tree, tensors: Mapping[str, TensorInfo]) -> int:
    """How many blocks at the end could be missing, and what is left would be a model of the same kind."""

    def contents(block: Module) -> dict[str, TensorInfo]:
        start = len(tree.path(block))
        return {name[start:]: tensors[name] for name in tree.names_below([block])}

    last = contents(blocks[-1])
    count = 0
    for block in reversed(blocks[:-1]):
        if contents(block) != last:
            break
        count += 1
    return count
