"""What is wrong with a spec for a base, gathered over all its rules, so that all is said at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..errors import Problem
from ..parsing import Place
from ..rules import Item
from ..selectors import Selection, Space, select
from ..spec import Spec
from ..wording import enumerate_names

__all__ = ["Findings"]


class Findings:
    """What is wrong with a spec, and what is odd about it, gathered over all its rules."""

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        self.problems: list[Problem] = []
        self.notes: list[str] = []

    def add(self, place: Place, message: str) -> None:
        self.problems.append(self.spec.problem(place, message))

    def note(self, message: str) -> None:
        self.notes.append(message)

    def select(self, place: Place, items: Sequence[Item] | None, space: Space) -> Selection:
        selection = select(self.spec, place, items or (), space)
        self.problems += selection.problems
        self.notes += selection.notes
        return selection

    def claimed_twice(self, names: Sequence[str], one: Place, other: Place, remedy: str) -> None:
        places = f"{self.spec.written(one)} and {self.spec.written(other)}"
        self.add(other, f"{places} both claim {enumerate_names(names, 3)}; {remedy}")

    def rules(self, key: str, selection: Selection) -> Callable[[str], str | None]:
        """Where in the spec a name was decided."""
        written = {position: self.spec.written((key, position)) for position in set(selection.item.values())}
        # What `train` does not name is frozen by the key as a whole.
        as_a_whole = "train" if key == "train" and self.spec.train is not None else None
        return lambda name: written.get(selection.item.get(name, -1), as_a_whole)
