"""Pickles that are looked at with care, and in bounds: what they make of a file stays in proportion to it."""

from __future__ import annotations

import pickle
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import is_dataclass
from typing import Any, BinaryIO, ClassVar

__all__ = ["SCALARS", "CarefulUnpickler", "OddPickle", "is_small", "memory_for"]

SCALARS = (str, int, float, bool, bytes, type(None))

#: What unpickling may take in memory, in bytes: so much, and so much more for each byte of the file.
FREE_MEMORY = 1 << 27
MEMORY_PER_BYTE = 10
#: What an operation takes at most, in bytes, on a 64-bit system: what it makes, and its place on the stack. A call
#: makes a tensor, what is remembered has an entry in a table.
_COSTS: Mapping[int, int] = defaultdict(
    lambda: 32,
    {
        code[0]: cost
        for cost, codes in {
            64: (pickle.BINUNICODE, pickle.SHORT_BINSTRING, pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3),
            80: (pickle.BINPUT, pickle.LONG_BINPUT, pickle.MEMOIZE, pickle.EMPTY_DICT, pickle.EMPTY_LIST),
            160: (pickle.MARK, pickle.GLOBAL, pickle.STACK_GLOBAL, pickle.DICT, pickle.LIST, pickle.PUT),
            240: (pickle.EMPTY_SET, pickle.FROZENSET),
            400: (pickle.REDUCE, pickle.NEWOBJ, pickle.NEWOBJ_EX, pickle.BINPERSID, pickle.INST, pickle.OBJ),
        }.items()
        for code in codes
    },
)
_MARK_COST = _COSTS[pickle.MARK[0]]
#: Parts of what is given to one call: torch's own have some ten, and a number for each dimension.
_MOST_PARTS = 1000
#: Bytes that a character of a text takes at most.
_WIDEST_CHARACTER = 4


class OddPickle(pickle.UnpicklingError):
    """A pickle that no saver of weights would have written."""


def memory_for(nbytes: int) -> int:
    """What unpickling a file may take in memory, in bytes.

    Args:
        nbytes: Size of the file.
    """
    return FREE_MEMORY + MEMORY_PER_BYTE * nbytes


class CarefulUnpickler(pickle._Unpickler):
    """An unpickler whose dictionaries have plain keys, that alters no class or function, and whose memory is limited.

    Hashing what is nested without end crashes the interpreter. It builds on the unpickler in Python, which lets itself
    be kept from that.

    Args:
        file: What it reads.
        memory: How many bytes of memory what it makes may take.
    """

    dispatch: ClassVar[dict[int, Any]] = dict(pickle._Unpickler.dispatch)
    #: The operations that it knows; None for all.
    operations: ClassVar[frozenset[int] | None] = None
    stack: list[Any]
    metastack: list[list[Any]]

    def __init__(self, file: BinaryIO, memory: int) -> None:
        self._metered = _Metered(self.dispatch, self.operations, memory)
        super().__init__(_Bounded(file, self._metered), encoding="utf-8")
        self.dispatch = self._metered  # type: ignore[misc]  # that of one unpickler

    def is_plain(self, key: object) -> bool:
        """Whether something may be a key."""
        return type(key) in SCALARS or (type(key) is tuple and all(type(one) in SCALARS for one in key))

    def may_be_built(self, one: object) -> bool:
        """Whether something may be given a state."""
        return not isinstance(one, type) and not callable(one)

    def refuse_odd(self, keys: Iterable[object]) -> None:
        """Raise OddPickle if something may not be a key."""
        if not all(map(self.is_plain, keys)):
            raise OddPickle("a key that is neither text nor a number")

    def pop_mark(self) -> list[Any]:
        self._metered.left += _MARK_COST
        items: list[Any] = super().pop_mark()  # type: ignore[misc]  # typeshed has none of these
        return items

    def load_setitem(self) -> None:
        self.refuse_odd([self.stack[-2]])
        super().load_setitem()  # type: ignore[misc]

    def load_setitems(self) -> None:
        self.refuse_odd(self.stack[::2])
        super().load_setitems()  # type: ignore[misc]

    def load_dict(self) -> None:
        self.refuse_odd(self.stack[::2])
        super().load_dict()  # type: ignore[misc]

    def load_additems(self) -> None:
        self.refuse_odd(self.stack)
        super().load_additems()  # type: ignore[misc]

    def load_frozenset(self) -> None:
        self.refuse_odd(self.stack)
        super().load_frozenset()  # type: ignore[misc]

    def load_build(self) -> None:
        if not self.may_be_built(self.stack[-2]):
            raise OddPickle("a class or function would be altered")
        if type(self.stack[-1]) is not dict and not is_small(self.stack[-1]):
            raise OddPickle("a state that torch does not write")
        super().load_build()  # type: ignore[misc]

    def load_reduce(self) -> None:
        self._refuse_large(self.stack[-1])
        super().load_reduce()  # type: ignore[misc]

    def load_newobj(self) -> None:
        self._refuse_large(self.stack[-1])
        super().load_newobj()  # type: ignore[misc]

    def _refuse_large(self, arguments: object) -> None:
        """Refuse what a call may show or hash."""
        if not is_small(arguments):
            raise OddPickle("more is given to a call than torch writes")

    def load_unknown(self) -> None:
        raise OddPickle("an operation that torch does not write")

    dispatch[pickle.SETITEM[0]] = load_setitem
    dispatch[pickle.SETITEMS[0]] = load_setitems
    dispatch[pickle.DICT[0]] = load_dict
    dispatch[pickle.ADDITEMS[0]] = load_additems
    dispatch[pickle.FROZENSET[0]] = load_frozenset
    dispatch[pickle.BUILD[0]] = load_build
    dispatch[pickle.REDUCE[0]] = load_reduce
    dispatch[pickle.NEWOBJ[0]] = load_newobj
    for _one in (pickle.BYTEARRAY8, pickle.EXT1, pickle.EXT2, pickle.EXT4, pickle.INST, pickle.NEWOBJ_EX, pickle.OBJ):
        dispatch[_one[0]] = load_unknown


def is_small(given: object) -> bool:
    """Whether something has few parts, each counted as often as it stands in it: what is nested can be without end."""
    left, count = [given], 0
    while left:
        one = left.pop()
        inside: Collection[object] = (
            one.values() if isinstance(one, dict) else one if isinstance(one, list | tuple) else ()
        )
        count += 1 + len(inside)
        if count > _MOST_PARTS or is_dataclass(one):  # as text, an object may be as long
            return False
        left.extend(inside)
    return True


class _Metered(dict[int, Any]):
    """What does each operation, by its code; to ask for it is to have it done, and is counted.

    Attributes:
        left: Bytes of memory that may yet be taken.
    """

    def __init__(self, dispatch: Mapping[int, Any], operations: frozenset[int] | None, memory: int) -> None:
        super().__init__(
            (code, method) for code, method in dispatch.items() if operations is None or code in operations
        )
        self.left = memory
        self._costs = [_COSTS[code] for code in range(256)]

    def __getitem__(self, code: int) -> Any:
        self.spend(self._costs[code])
        return super().__getitem__(code)

    def __missing__(self, code: int) -> Any:
        raise pickle.UnpicklingError(f"Unsupported operand {code}")

    def spend(self, nbytes: int) -> None:
        self.left -= nbytes
        if self.left < 0:
            raise OddPickle("unpickled, it would take far more memory than the file has bytes")


class _Bounded:
    """A file of which no more is asked for than memory is left, however much a pickle says that there is."""

    def __init__(self, file: BinaryIO, metered: _Metered) -> None:
        self._file, self._metered = file, metered
        self.readline = file.readline

    def read(self, count: int) -> bytes:
        if count > 8:  # as numbers have
            self._metered.spend(_WIDEST_CHARACTER * count)
        return self._file.read(count)
