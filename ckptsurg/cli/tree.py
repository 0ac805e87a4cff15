"""The tree of modules, with blocks that are alike folded into one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from ..tensors import TensorInfo

__all__ = ["Node", "build"]

_DEEPEST = 64


@dataclass(eq=False)
class Node:
    """A module or a tensor.

    Attributes:
        info: Dtype and shape of a tensor; None for a module.
        children: What is below it, by segment.
        copies: How many blocks the node stands for.
        kind: Equal for nodes of one tree that are alike in everything but their own names.
    """

    info: TensorInfo | None = None
    children: dict[str, Node] = field(default_factory=dict)
    copies: int = 1
    kind: int = -1

    @cached_property
    def elements(self) -> int:
        own = self.info.elements if self.info is not None else 0
        return own + sum(child.elements for child in self.children.values())

    @cached_property
    def nbytes(self) -> int:
        """Size in bytes."""
        own = self.info.nbytes if self.info is not None else 0
        return own + sum(child.nbytes for child in self.children.values())

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
        return f"{{{run[0]}..{run[-1]}}}", Node(first.info, first.children, copies=len(run))


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
            place = place.children.setdefault(segment, Node())
        place.info = info
    _tell_apart(root, {})
    return root


def _tell_apart(node: Node, kinds: dict[object, int]) -> int:
    below = tuple((segment, _tell_apart(child, kinds)) for segment, child in node.children.items())
    node.kind = kinds.setdefault((node.info, below), len(kinds))
    return node.kind
