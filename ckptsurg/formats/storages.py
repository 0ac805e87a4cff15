"""What a pickle of torch asks for, found out without torch, which takes its keys, sizes and arguments on trust."""

from __future__ import annotations

import io
import pickle
from collections.abc import Mapping, Sequence
from math import prod
from typing import Any, BinaryIO, ClassVar

from ..frameworks.dtypes import DTYPES
from ..tensors import DTYPE_BITS
from .pickles import SCALARS, CarefulUnpickler, OddPickle, is_small

__all__ = ["storages_in"]

#: Bytes per element of the storages that an archive names.
_ELEMENT_BYTES = {
    "BFloat16Storage": 2, "BoolStorage": 1, "ByteStorage": 1, "CharStorage": 1, "ComplexDoubleStorage": 16,
    "ComplexFloatStorage": 8, "DoubleStorage": 8, "FloatStorage": 4, "HalfStorage": 2, "IntStorage": 4,
    "LongStorage": 8, "QInt32Storage": 4, "QInt8Storage": 1, "QUInt2x4Storage": 1, "QUInt4x2Storage": 1,
    "QUInt8Storage": 1, "ShortStorage": 2, "UntypedStorage": 1,
}  # fmt: skip
#: What torch itself reads of the pickle protocol.
_OPERATIONS = (
    pickle.APPEND, pickle.APPENDS, pickle.BINFLOAT, pickle.BINGET, pickle.BININT, pickle.BININT1, pickle.BININT2,
    pickle.BINPERSID, pickle.BINPUT, pickle.BINUNICODE, pickle.BUILD, pickle.EMPTY_DICT, pickle.EMPTY_LIST,
    pickle.EMPTY_SET, pickle.EMPTY_TUPLE, pickle.GLOBAL, pickle.LONG1, pickle.LONG_BINGET, pickle.LONG_BINPUT,
    pickle.MARK, pickle.NEWFALSE, pickle.NEWOBJ, pickle.NEWTRUE, pickle.NONE, pickle.PROTO, pickle.REDUCE,
    pickle.SETITEM, pickle.SETITEMS, pickle.SHORT_BINSTRING, pickle.STOP, pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2,
    pickle.TUPLE3,
)  # fmt: skip
_COLLECTIONS = ("Counter", "OrderedDict", "set")
#: Makers of tensors, whose last argument is whatever state the tensor had.
_WITH_STATE = ("_rebuild_from_type_v2", "_rebuild_parameter_with_state")


def storages_in(pickled: BinaryIO | bytes, memory: int, begins_with: Sequence[object] = ()) -> Mapping[str, int | None]:
    """The storages that pickles name, and their sizes in bytes, None where that is not known.

    Args:
        pickled: A pickle, after others or by itself.
        memory: How many bytes of memory they may take.
        begins_with: What the pickles before it must hold; None for whatever they do.

    Raises:
        OddPickle: if torch should not be given them.
        UnpicklingError: if they are no good; as does whatever else goes wrong in them.
    """
    file = io.BytesIO(pickled) if isinstance(pickled, bytes) else pickled
    found: dict[str, int | None] = {}
    for wanted in (*begins_with, None):
        looking = _Looking(file, memory)
        made = looking.load()
        if wanted is not None and made != wanted:
            raise pickle.UnpicklingError("Invalid magic number")
        found |= looking.storages
    return found


class _Nothing:
    """Stands for whatever a call makes: filled or changed, it stays nothing."""

    __slots__ = ()

    def __setstate__(self, _: object) -> None: ...
    def __setitem__(self, _: object, __: object) -> None: ...
    def append(self, _: object) -> None: ...
    def extend(self, _: object) -> None: ...
    def add(self, _: object) -> None: ...
    def update(self, *_: object) -> None: ...


class _Global(_Nothing):
    """Stands for a class or function that a pickle names."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name


class _Storage(_Nothing):
    """Stands for the bytes of tensors.

    Attributes:
        nbytes: How many; None where that is not known.
        element: Bytes per element; None likewise.
    """

    __slots__ = ("element", "nbytes")

    def __init__(self, nbytes: int | None, element: int | None) -> None:
        self.nbytes, self.element = nbytes, element


_NOTHING = _Nothing()


class _Looking(CarefulUnpickler):
    """Builds nothing of what a pickle names, and takes down which storages it asks for."""

    dispatch: ClassVar[dict[int, Any]] = dict(CarefulUnpickler.dispatch)
    operations: ClassVar[frozenset[int] | None] = frozenset(code[0] for code in _OPERATIONS)

    def __init__(self, file: BinaryIO, memory: int) -> None:
        super().__init__(file, memory)
        self.storages: dict[str, int | None] = {}

    def find_class(self, module: str, name: str) -> _Global:
        return _Global(name)

    def may_be_built(self, one: object) -> bool:
        return not isinstance(one, _Global)

    def load_reduce(self) -> None:
        arguments = self.stack.pop()
        self._refuse_call(self.stack[-1], arguments)
        self.stack[-1] = _NOTHING

    load_newobj = load_reduce

    def load_build(self) -> None:
        state = self.stack[-1]
        if type(state) is tuple and any(isinstance(one, _Storage) for one in state):
            raise OddPickle("a state that torch does not write")
        super().load_build()

    def _refuse_call(self, called: object, arguments: Any) -> None:
        """Refuse what would have torch hash, show or build what grows as it is done."""
        if not isinstance(called, _Global) or type(arguments) is not tuple:
            raise OddPickle("a call of what is no function")
        name = called.name
        if name in _COLLECTIONS:
            content = arguments[0] if arguments else ()
            if type(content) is list and name == "OrderedDict":  # as of Python 2
                content = [pair[0] for pair in content if type(pair) in (list, tuple) and pair]
            self.refuse_odd(content if type(content) in (dict, list, tuple) else arguments)
            return
        if name in _WITH_STATE:
            arguments = arguments[:-1]
        is_good = is_small(arguments)
        if name == "encode":  # of bytes, which protocol 2 lacks; other encodings make them longer and longer
            is_good = len(arguments) == 2 and type(arguments[0]) is str and arguments[1] == "latin1"
        elif name == "bytearray":
            is_good = not arguments or type(arguments[0]) in (str, bytes, _Nothing)
        elif name.endswith("Tensor"):  # they are made by functions, not of numbers
            is_good = not arguments or all(type(one) not in (*SCALARS, list, tuple) for one in arguments)
        elif is_good and name == "_rebuild_from_type_v2" and isinstance(arguments[0], _Global):
            self._refuse_call(arguments[0], arguments[2])
        elif is_good and name.startswith("_rebuild") and arguments and isinstance(arguments[0], _Storage):
            is_good = _is_inside(*arguments)
        if not is_good:
            raise OddPickle(f"what is given to {name} is none of what torch writes")

    def persistent_load(self, pid: Any) -> _Nothing:
        """The storage of ``("storage", type, key, location, elements)``; the older format has a view of it besides."""
        if type(pid) is tuple and len(pid) == 4 and pid[0] == "module" and isinstance(pid[1], _Global):
            return pid[1]  # with its source, in the older format
        view = None
        if type(pid) is tuple and len(pid) == 6:
            *pid, view = pid
        types = [type(one) for one in pid] if type(pid) in (tuple, list) else []
        is_good = types == [str, _Global, str, str, int] and pid[0] == "storage" and pid[4] >= 0
        if view is not None:
            is_good = is_good and type(view) is tuple and [type(one) for one in view] == [str, int, int]
        if not is_good:
            raise OddPickle("a storage that torch does not write")
        element = _ELEMENT_BYTES.get(pid[1].name)
        nbytes = None if element is None else pid[4] * element
        if self.storages.setdefault(pid[2], nbytes) != nbytes:
            raise OddPickle("a storage of two sizes")
        if view is None or element is None or nbytes is None:
            return _Storage(nbytes, element)
        if not 0 <= view[1] <= view[1] + view[2] <= pid[4]:
            raise OddPickle("a view of more than its storage")
        return _Storage(view[2] * element, element)

    dispatch[pickle.BUILD[0]] = load_build
    dispatch[pickle.NEWOBJ[0]] = load_newobj
    dispatch[pickle.REDUCE[0]] = load_reduce


def _is_inside(storage: _Storage, offset: object = 0, size: Any = (), stride: Any = (), *more: object) -> bool:
    """Whether a tensor is part of its storage. Where it is not, torch makes the storage larger, of whatever was there.

    Args:
        storage: What it is a view of.
        offset: Its first element.
        size: Its shape.
        stride: Elements from one to the next, by dimension.
        more: What torch is told besides: a dtype, if the storage has none.
    """
    if type(offset) is not int or type(size) is not tuple or type(stride) is not tuple or len(size) != len(stride):
        return False
    if any(type(one) is not int or one < 0 for one in (offset, *size, *stride)):
        return False
    dtypes = [DTYPES[one.name] for one in more if isinstance(one, _Global) and one.name in DTYPES]
    element = DTYPE_BITS[dtypes[0]] // 8 if dtypes else storage.element
    if storage.nbytes is None or element is None or not prod(size):
        return True
    last = offset + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
    is_inside: bool = (last + 1) * element <= storage.nbytes
    return is_inside
