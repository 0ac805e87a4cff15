"""What is wrong with a spec, as far as that can be said without a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ..errors import Problem, SpecError
from ..matching import Names
from ..patterns import OutOfRange, PatternError
from ..spec import Spec, read_spec
from ..wording import shown

__all__ = ["check"]

_SELECTORS = ("drop", "freeze", "train")
_RULES = ("reinit", "cast", "graft", "rename")


def check(path: Path) -> Spec:
    """Read a spec, and each pattern in it: whether it matches anything is not known.

    A tensor may be called what no pattern can be (``odd[name``); that is a problem here, and none to a plan.

    Raises:
        SpecError: with every problem at once.
        UsageError: if there is no such file.
    """
    text = read_spec(path)
    problems: list[Problem] = []
    spec: Spec | None
    try:
        spec = Spec.from_text(text)
    except SpecError as error:
        problems += error.problems
        spec = Spec.repaired(text)
    if spec is not None:
        problems += _problems(spec)
    if problems or spec is None:
        raise SpecError(text.label, problems)
    return spec


def _problems(spec: Spec) -> Iterator[Problem]:
    nothing = Names(())
    for key in (*_SELECTORS, *_RULES):
        for position, item in enumerate(getattr(spec, key) or ()):
            place = (key, position, "match")
            is_negative = key in _SELECTORS and item.match.startswith("!")
            if is_negative and position == 0:
                message = f'"{shown(item.match)}" only takes away; what is selected comes before it'
                yield spec.problem(place, message)
                continue
            try:
                nothing.match(item.match[1:] if is_negative else item.match)
            except OutOfRange:
                continue
            except PatternError as error:
                yield spec.problem(place, f'"{shown(item.match)}": {error}')
