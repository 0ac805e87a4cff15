"""A page -> HTML: one file, in which nothing is fetched, and nothing but its own style and script is obeyed."""

from __future__ import annotations

import os
import re
from base64 import b64encode
from collections.abc import Iterator
from functools import cache
from hashlib import sha256
from importlib.metadata import version
from itertools import pairwise
from math import isfinite, isinf
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..wording import counted, shown, size
from .entries import STATES
from .heat import SHADES, Cell, level
from .model import MOST_ROWS, Page

__all__ = ["place_for", "render"]

#: By which a page of an earlier run is known.
_GENERATOR = '<meta name="generator" content="ckptsurg">'
_HEAD = 4096
_LONGEST_LABEL = 80


def render(page: Page) -> bytes:
    """The page as HTML.

    Raises:
        UsageError: if Jinja2 is not installed.
    """
    template = _environment().get_template("page.html.j2")
    style, script = _text("style.css"), _text("filter.js")
    text: str = template.render(
        page=page,
        style=style,
        script=script,
        style_hash=_hash(style),
        script_hash=_hash(script),
        version=version("ckptsurg"),
        most_rows=MOST_ROWS,
        states=STATES,
        shades=_shades(),
        used={cell.state for cell in _cells(page)},
        signs={sign: meaning for sign, meaning in _SIGNS.items() if sign in set(map(_cell, _cells(page)))},
    )
    # A name may hold what is no UTF-8.
    return text.encode("utf-8", "backslashreplace")


def place_for(path: Path, *, overwrite: bool) -> Path:
    """Where a page may be written, refused before any work is done for it.

    Raises:
        UsageError: if something stands there that is not to be overwritten, or is no page; or without Jinja2.
    """
    _environment()
    if os.path.lexists(path) and not overwrite:
        raise UsageError(f"{shown(path)}: exists already", hint="--overwrite replaces an earlier page")
    if os.path.lexists(path) and not _is_page(path):
        raise UsageError(f"{shown(path)}: is no page of ckptsurg and is not replaced; choose another place")
    return path


def _is_page(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return not path.is_symlink() and _GENERATOR.encode() in file.read(_HEAD)
    except OSError:
        return False


@cache
def _environment() -> Any:
    try:
        from jinja2 import Environment, PackageLoader, StrictUndefined
    except ModuleNotFoundError:
        raise UsageError("a page needs Jinja2, which is not installed", hint="pip install 'ckptsurg[pages]'") from None
    environment = Environment(
        loader=PackageLoader(__package__),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "breakable": _breakable,
        "bytes": size,
        "cell": _cell,
        "counted": counted,
        "label": lambda text: shown(text, _LONGEST_LABEL),
        "ratio": _ratio,
        "shade": level,
        "spans": _spans,
        "told": _told,
    }
    return environment


def _breakable(text: str) -> Any:
    """A name that goes on in the next line after one of its parts, and not within a word."""
    from markupsafe import Markup, escape

    return Markup("<wbr>").join(escape(part) for part in re.split(r"(?<=[./_])(?=.)", text))


def _text(name: str) -> str:
    return (Path(__file__).parent / "templates" / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    """What a Content-Security-Policy calls a style or script that it allows."""
    return f"sha256-{b64encode(sha256(text.encode()).digest()).decode()}"


# --- Numbers in words ----------------------------------------------------------------------------------


def _ratio(value: float, digits: int = 2) -> str:
    """``2.1e-3``, or what stands for what is no number."""
    if not isfinite(value):
        return "from zero" if isinf(value) else "not finite"
    mantissa, _, exponent = f"{value:.{digits - 1}e}".partition("e")
    return "0" if not value else f"{mantissa}e{int(exponent)}"


#: What stands in the place of a number, and what it means.
_SIGNS = {
    "∞": "changed from all zeros",
    "NaN": "changed from or to what is not finite",
    "±0": "other bits, but the same values: the sign of a zero, or the bits of a NaN",
}


def _cell(cell: Cell) -> str:
    """What stands in a cell: a number where there is one, else the sign of its state."""
    if cell.relative is None or cell.state not in ("changed", "moved", "other"):
        return STATES[cell.state][0]
    if not isfinite(cell.relative):
        return "∞" if isinf(cell.relative) else "NaN"
    if not cell.relative:
        return STATES["other"][0] if cell.state == "other" else "±0"
    return _ratio(cell.relative, 1)


def _told(cell: Cell) -> str:
    """What a cell says, in words."""
    words = STATES[cell.state][1]
    if cell.relative is not None and cell.state in ("changed", "moved"):
        words = f"{'frozen, and changed' if cell.state == 'changed' else 'changed'}, by {_ratio(cell.relative)}"
    return words if cell.tensors == 1 else f"{cell.alike:,} of {cell.tensors:,}: {words}"


def _spans(nbytes: list[int], scale: int) -> list[tuple[str, str]]:
    """Where parts of a bar begin and how wide they are, in percent of the scale."""
    found, begin = [], 0
    for one in nbytes:
        found.append((f"{100 * begin / scale:.3f}%", f"{100 * one / scale:.3f}%"))
        begin += one
    return found


def _shades() -> list[str]:
    """What each shade stands for."""
    limits = [_ratio(limit, 1) for limit in SHADES]
    between = [f"{low} to {high}" for low, high in pairwise(limits)]
    return [f"below {limits[0]}", *between, f"{limits[-1]} or more"]


def _cells(page: Page) -> Iterator[Cell]:
    for grid in page.grids:
        for _, cells in grid.rows:
            yield from filter(None, cells)
