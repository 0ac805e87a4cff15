"""Where something is, as an argument: a path, or a URL, which a path would take apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ..errors import UsageError
from ..urls import as_url

__all__ = ["Place"]


class Place(click.Path):
    """A path; of a checkpoint that is read, also a URL.

    Args:
        remote: Whether it may be a URL.
    """

    def __init__(self, *, remote: bool) -> None:
        super().__init__(path_type=Path)
        self._remote = remote

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        url = as_url(value)
        if url is not None and not self._remote:
            raise UsageError(f"{url}: expected a path; only a checkpoint that is read may be on another machine")
        return url or super().convert(value, param, ctx)
