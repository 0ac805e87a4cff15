"""Taking the place of one method of one module."""

from __future__ import annotations

from typing import Any, Self

from torch import nn

__all__ = ["StandIn"]


class StandIn:
    """Takes the place of a method of a module, and of nothing else: its class stays what it is.

    Stand-ins for one method may be withdrawn in any order. A copy of the module, by pickle or deepcopy, gets the method
    of its class.
    """

    method: str

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.replaced: Any = module.__dict__.get(self.method)
        module.__dict__[self.method] = self

    def original(self, *args: Any) -> None:
        """Call what it stands in for."""
        method = self.replaced or getattr(type(self.module), self.method).__get__(self.module)
        method(*args)

    def withdraw(self) -> Self | None:
        """Leave the place. A later stand-in that held on to this one, which is the answer, holds on to what it did."""
        current = self.module.__dict__.get(self.method)
        if current is self:
            del self.module.__dict__[self.method]
            if self.replaced is not None:
                self.module.__dict__[self.method] = self.replaced
            return None
        while isinstance(current, type(self)) and current.replaced is not self:
            current = current.replaced
        if not isinstance(current, type(self)):
            return None
        current.replaced = self.replaced
        return current

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (self.module, self.method)
