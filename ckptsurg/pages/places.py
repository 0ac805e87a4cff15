"""Where a name stands in a model: its stack of numbered blocks, its block, and its role there."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

__all__ = ["Place", "by_block", "numbers_in", "place_of", "starred"]

_NUMBERED = re.compile(r"(?:^|[./])([0-9]+)(?=[./])")
_LAST = re.compile(r"[./](?=[^./]*$)")
_NUMBER = re.compile(r"(?<![^./])[0-9]+(?![^./])")

_Value = TypeVar("_Value")


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor stands.

    Attributes:
        stack: What its block is one of, ``model.layers``; None where no part of the name but the last is a number.
        number: The block's number, as it is written; empty where there is none.
        block: The block, ``model.layers.3``, or else the module that the tensor is in.
        role: What the name says after that, ``self_attn.q_proj.weight``; empty for a tensor outside of any module.
    """

    stack: str | None
    number: str
    block: str
    role: str


def place_of(name: str) -> Place:
    """The place of a tensor: the first number in a name is that of its block."""
    if found := _NUMBERED.search(name):
        return Place(name[: found.start()], found[1], name[: found.end()], name[found.end() + 1 :])
    if found := _LAST.search(name):
        return Place(None, "", name[: found.start()], name[found.end() :])
    return Place(None, "", name, "")


def by_block(named: Iterable[tuple[str, _Value]]) -> Mapping[str | None, Mapping[str, list[tuple[str, _Value]]]]:
    """Roles and what belongs to them, by block, by stack; the blocks of a stack in the order of their numbers.

    Stacks, modules outside of them, and roles stand in the order in which they are first met.
    """
    stacks: dict[str | None, dict[str, list[tuple[str, _Value]]]] = {}
    numbers: dict[str, str] = {}
    for name, value in named:
        place = place_of(name)
        stacks.setdefault(place.stack, {}).setdefault(place.block, []).append((place.role, value))
        numbers[place.block] = place.number

    def in_order(block: str) -> tuple[int, str, str]:
        digits = numbers[block].lstrip("0")
        return len(digits), digits, numbers[block]  # no int: a name may have more digits than Python converts

    return {
        stack: blocks if stack is None else {block: blocks[block] for block in sorted(blocks, key=in_order)}
        for stack, blocks in stacks.items()
    }


def starred(role: str) -> str:
    """A role with a star for each number in it: that of all experts."""
    return _NUMBER.sub("*", role)


def numbers_in(role: str) -> list[str]:
    """The numbers that ``starred`` puts stars for."""
    return _NUMBER.findall(role)
