"""Pickles that are looked at with care: what torch's own readers take on trust, their keys and sizes."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Iterable, Mapping
from math import prod
from typing import Any, BinaryIO, ClassVar

__all__ = ["CarefulUnpickler", "OddPickle", "storages_in"]

_SCALARS = (str, int, float, bool, bytes, type(None))


class OddPickle(pickle.UnpicklingError):
    """A pickle that no saver of weights would have written."""


class CarefulUnpickler(pickle._Unpickler):
    """An unpickler whose dictionaries have plain keys, and that alters no class or function.

    Hashing what is nested without end crashes the interpreter. It builds on the unpickler in Python, which lets itself
    be kept from that.
    """

    dispatch: ClassVar[dict[int, Any]] = dict(pickle._Unpickler.dispatch)
    stack: list[Any]
    metastack: list[list[Any]]

    def is_plain(self, key: object) -> bool:
        """Whether something may be a key."""
        return type(key) in _SCALARS or (type(key) is tuple and all(type(one) in _SCALARS for one in key))

    def may_be_built(self, one: object) -> bool:
        """Whether something may be given a state."""
        return not isinstance(one, type) and not callable(one)

    def _refuse_odd(self, keys: Iterable[object]) -> None:
        if not all(map(self.is_plain, keys)):
            raise OddPickle("a key that is neither text nor a number")

    def load_setitem(self) -> None:
        self._refuse_odd([self.stack[-2]])
        super().load_setitem()  # type: ignore[misc]  # typeshed has none of these

    def load_setitems(self) -> None:
        self._refuse_odd(self.stack[::2])
        super().load_setitems()  # type: ignore[misc]

    def load_dict(self) -> None:
        self._refuse_odd(self.stack[::2])
        super().load_dict()  # type: ignore[misc]

    def load_additems(self) -> None:
        self._refuse_odd(self.stack)
        super().load_additems()  # type: ignore[misc]

    def load_frozenset(self) -> None:
        self._refuse_odd(self.stack)
        super().load_frozenset()  # type: ignore[misc]

    def load_build(self) -> None:
        if not self.may_be_built(self.stack[-2]):
            raise OddPickle("a class or function would be altered")
        super().load_build()  # type: ignore[misc]

    def load_bytearray8(self) -> None:
        raise OddPickle("a bytearray, which torch does not write")

    dispatch[pickle.SETITEM[0]] = load_setitem
    dispatch[pickle.SETITEMS[0]] = load_setitems
    dispatch[pickle.DICT[0]] = load_dict
    dispatch[pickle.ADDITEMS[0]] = load_additems
    dispatch[pickle.FROZENSET[0]] = load_frozenset
    dispatch[pickle.BUILD[0]] = load_build
    dispatch[pickle.BYTEARRAY8[0]] = load_bytearray8


class _Nothing:
    """Stands for whatever a pickle names: called, filled or changed, it stays nothing."""

    def __new__(cls, *_: object, **__: object) -> _Nothing:
        return super().__new__(cls)

    def __init__(self, *_: object, **__: object) -> None: ...
    def __setstate__(self, _: object) -> None: ...
    def __setitem__(self, _: object, __: object) -> None: ...
    def append(self, _: object) -> None: ...
    def extend(self, _: object) -> None: ...
    def add(self, _: object) -> None: ...
    def update(self, *_: object) -> None: ...


#: Bytes per element of the storages that an archive names.
_ELEMENT_BYTES = {
    "BFloat16Storage": 2, "BoolStorage": 1, "ByteStorage": 1, "CharStorage": 1, "ComplexDoubleStorage": 16,
    "ComplexFloatStorage": 8, "DoubleStorage": 8, "FloatStorage": 4, "HalfStorage": 2, "IntStorage": 4,
    "LongStorage": 8, "ShortStorage": 2, "UntypedStorage": 1,
}  # fmt: skip


class _Looking(CarefulUnpickler):
    """Builds nothing of what a pickle names, and takes down which storages it asks for."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file)
        self.storages: dict[str, int | None] = {}

    def find_class(self, module: str, name: str) -> Callable[..., Any]:
        return type(name, (_Nothing,), {})

    def persistent_load(self, pid: Any) -> object:
        if type(pid) is tuple and len(pid) >= 5 and pid[0] == "storage" and isinstance(pid[1], type):
            size = _ELEMENT_BYTES.get(pid[1].__name__)
            is_known = size is not None and type(pid[4]) is int
            self.storages[str(pid[2])] = prod((size or 0, pid[4])) if is_known else None
        return _Nothing()


def storages_in(pickled: BinaryIO | bytes, count: int = 1) -> Mapping[str, int | None] | None:
    """The storages that pickles name, and their sizes in bytes, None where that is not known; None if they are no good.

    Args:
        pickled: One pickle, or some behind one another.
        count: How many.

    Raises:
        OddPickle: if torch should not be given them.
    """
    file = io.BytesIO(pickled) if isinstance(pickled, bytes) else pickled
    found: dict[str, int | None] = {}
    for _ in range(count):
        looking = _Looking(file)
        try:
            looking.load()
        except OddPickle:
            raise
        except Exception:  # torch says better what is wrong with it
            return None
        found |= looking.storages
    return found
