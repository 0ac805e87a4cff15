"""The tree of modules, with blocks that are alike folded into one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from ..tensors import TensorInfo

__all__ = ["Node", "build"]

_DEEPEST = 64


@dataclass(eq=False, slots=True)
class Node:
    """A module or a tensor.

    Attributes:
        info: Dtype and shape of a tensor; None for a module.
        children: What is below it, by segment.
        copies: How many blocks the node stands for.
        kind: Equal for nodes of one tree that are alike in everything but their own names.
        elements: How many elements it has, with all that is below it.
        nbytes: Size of these in bytes.
    """

    info: TensorInfo | None = None
    children: dict[str, Node] = field(default_factory=dict)
    copies: int = 1
    kind: int = -1
    elements: int = 0
    nbytes: int = 0

    def folded(self) -> list[tuple[str, Node]]:
        """The children by what to call them; those in a row of numbers that are alike are one: ``{0..31}``."""
        numbers = sorted(int(segment) for segment in self.children if segment.isdecimal() and segment.isascii())
        numbered = {str(number): number for number in numbers}
        rows = [_joined(segment, child) for segment, child in self.children.items() if segment not in numbered]
        run: list[int] = []
        for number in [*dict.fromkeys(n for n in numbers if str(n) in self.children), None]:
            if run and (number != run[-1] + 1 or self.children[str(number)].kind != self.children[str(run[0])].kind):
                rows.append(self._block(run))
                run = []
            if number is not None:
                run.append(number)
        return rows

    def _block(self, run: list[int]) -> tuple[str, Node]:
        first = self.children[str(run[0])]
        if len(run) == 1:
            return _joined(str(run[0]), first)
        return f"{{{run[0]}..{run[-1]}}}", replace(first, copies=len(run))


def _joined(segment: str, node: Node) -> tuple[str, Node]:
    """A module with one child is shown with it in one line."""
    while node.info is None and len(node.children) == 1:
        [(below, child)] = node.children.items()
        segment, node = f"{segment}{'' if segment.endswith('/') else '.'}{below}", child
    return segment, node


def build(tensors: Mapping[str, TensorInfo]) -> Node:
    """The tree of named tensors."""
    root = Node()
    for name, info in tensors.items():
        place = root
        # A slash stays with the segment before it: a.b and a/b are two tensors.
        for segment in name.replace("/", "/.").split(".", _DEEPEST):
            below = place.children.get(segment)
            if below is None:
                below = place.children[segment] = Node()
            place = below
        place.info = info
    _sum_up(root, {})
    return root


def _sum_up(node: Node, kinds: dict[object, int]) -> None:
    """Fill in what follows from the tensors below a node."""
    alike: set[object] = set()  # in any order: a shard that ends within a block changes that of its tensors
    for segment, child in node.children.items():
        _sum_up(child, kinds)
        node.elements += child.elements
        node.nbytes += child.nbytes
        alike.add((segment, child.kind))
    if (info := node.info) is not None:
        node.elements += info.elements
        node.nbytes += info.nbytes
        alike.add(info)
    node.kind = kinds.setdefault(frozenset(alike), len(kinds))
