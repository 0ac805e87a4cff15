"""Names as a tree of their segments: modules, and the tensors in each."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from operator import attrgetter

from .errors import CheckpointError
from .wording import shown

__all__ = ["Module", "Tree"]

#: How many modules names may lead to: so many, and so many more for each name. A module takes some 400 bytes of memory,
#: and two letters in a name are enough to lead to one.
_MODULES = 100_000
_MODULES_PER_NAME = 8


class Module:
    """A module: what stands before a separator in names.

    Attributes:
        modules: The modules in it by their segment, in the order in which names first lead there.
        tensors: The names of the tensors in it by their last segment; ``a.b`` and ``a/b`` stand in one place.
        depth: How many segments lead here.
    """

    # A module's tensors and those below it are neighbours in the tree, and so are its modules.
    __slots__ = ("_end", "_first", "_last", "_number", "depth", "modules", "tensors")
    _number: int
    _end: int
    _first: int
    _last: int

    def __init__(self, depth: int) -> None:
        self.modules: dict[str, Module] = {}
        self.tensors: dict[str, tuple[str, ...]] = {}
        self.depth = depth


class Tree:
    """The names of a checkpoint, each once.

    Attributes:
        root: The module above all, where no segment leads.

    Raises:
        CheckpointError: if the names lead to many more modules than a model's do.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self.root = Module(0)
        #: Modules by path: those that hold tensors, and those just above. All prefixes of a deep path would be many.
        known: dict[str, Module] = {}
        names = list(names)
        self._longest = max(names, key=len, default="")
        self._room = _MODULES + _MODULES_PER_NAME * len(names)
        for name in names:
            path, _, leaf = f".{name.replace('/', '.')}".rpartition(".")
            module = known.get(path)
            if module is None:
                above, dot, segment = path.rpartition(".")
                parent = known.get(above)
                if parent is None:
                    parent = known[above] = self._reach(above)
                module = known[path] = self._below(parent, segment) if dot else self.root
            there = module.tensors.get(leaf)
            module.tensors[leaf] = (name,) if there is None else (*there, name)
        self._modules: list[Module] = []
        self._names: list[str] = []
        self._number()

    def _reach(self, path: str) -> Module:
        module = self.root
        for segment in path.split(".")[1:]:
            module = self._below(module, segment)
        return module

    def _below(self, module: Module, segment: str) -> Module:
        """The module in another by that segment, which is made where there is none."""
        found = module.modules.get(segment)
        if found is None:
            if not self._room:
                such = shown(self._longest, 60)
                raise CheckpointError(f'the tensors\' names lead to more modules than a model has, such as "{such}"')
            self._room -= 1
            found = module.modules[segment] = Module(module.depth + 1)
        return found

    def _number(self) -> None:
        pending = [self.root]
        while pending:
            module = pending.pop()
            module._number, module._first = len(self._modules), len(self._names)
            self._modules.append(module)
            for names in module.tensors.values():
                self._names += names
            module._end, module._last = len(self._modules), len(self._names)
            pending += reversed(module.modules.values())
        for module in reversed(self._modules):  # those below before those above
            for last in reversed(module.modules.values()):
                module._end, module._last = last._end, last._last
                break

    def names_below(self, modules: Iterable[Module]) -> list[str]:
        """The names of all tensors in these modules and below them, each once."""
        found: list[str] = []
        for module in _outermost(modules):
            found += self._names[module._first : module._last]
        return found

    def modules_below(self, modules: Iterable[Module]) -> list[Module]:
        """These modules and all below them, each once."""
        found: list[Module] = []
        for module in _outermost(modules):
            found += self._modules[module._number : module._end]
        return found

    def path(self, module: Module) -> str:
        """What leads to a module, as it is written in the first name there."""
        name = self._names[module._first]
        inside = name.replace("/", ".").split(".", module.depth)[-1]
        return name[: -len(inside) - 1] if module.depth else ""


def _outermost(modules: Iterable[Module]) -> Iterator[Module]:
    """The modules that stand below none of the others."""
    reached = 0
    for module in sorted(modules, key=attrgetter("_number")):
        if module._number >= reached:
            yield module
            reached = module._end
