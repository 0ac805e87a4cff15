"""All commands, in the order in which they are shown."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import Any

import click

from ..errors import SpecError, UsageError
from ..wording import shown
from .check import check
from .init import init
from .proving import attest, diff, verify
from .report import report
from .surgery import convert, demo, inspect, manifest, plan, rewrite, schema

__all__ = ["ReaderGone", "cli"]


class ReaderGone(Exception):
    """Nobody reads standard output any more. Click would exit with 1, which is what a difference exits with."""


#: Where a context keeps the words that its command was given.
_GIVEN = "ckptsurg.given"
#: So many names of files are no list that somebody has typed.
_MANY_FILES = 3


class _Commands(click.Group):
    def list_commands(self, context: click.Context) -> list[str]:
        return list(self.commands)

    def resolve_command(
        self, context: click.Context, words: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name, command, rest = super().resolve_command(context, words)
        context.meta[_GIVEN] = tuple(rest)
        return name, command, rest

    def invoke(self, context: click.Context) -> Any:
        try:
            return super().invoke(context)
        except BrokenPipeError:
            raise ReaderGone from None
        except (SpecError, click.UsageError) as error:
            raise _slip(error, context.meta.get(_GIVEN, ())) or error from None


def _slip(error: SpecError | click.UsageError, given: Sequence[str]) -> Exception | None:
    """What an error comes down to where the words themselves show the slip; None where they do not."""
    files = [word for word in given if os.path.lexists(word)]
    if isinstance(error, SpecError):
        is_many = len(error.problems) >= _MANY_FILES and len(files) > _MANY_FILES
        return UsageError(_EXPANDED, hint=_QUOTE) if is_many else None
    context = error.ctx
    if context is None or not (isinstance(error, click.MissingParameter) or "unexpected extra" in error.message):
        return None
    left = context.command.make_parser(context).parse_args(list(given))[1]
    if len(left) == 1 and isinstance(error, click.MissingParameter) and error.param and error.param.name == "out":
        return click.UsageError(f"{error.format_message()} Write -o {shown(left[0])}", context)
    if len(left) >= _MANY_FILES and all(word in files for word in left):
        return click.UsageError(f"{_EXPANDED}: {_QUOTE}", context)
    return None


_EXPANDED = "the shell has put names of files in the place of a pattern"
_QUOTE = "quote the pattern, such as '**'"


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="ckptsurg", message="%(prog)s %(version)s")
def cli() -> None:
    """Declarative surgery on model checkpoints, with proof that frozen weights stayed frozen.

    A checkpoint (CKPT) is a .safetensors file, a model folder, or the index of a sharded checkpoint; also a PyTorch
    archive (.pt, .pth, .bin), a folder of torch.distributed.checkpoint, or a file of Keras (.keras, .weights.h5, .h5).
    What is written is always safetensors.

    \b
    Exit codes: 0 done, or identical; 1 verify or diff found a difference;
    2 bad usage, spec or manifest; 3 a checkpoint that is malformed;
    4 the system failed; 130 interrupted.
    """  # noqa: D301 - \b is click's mark for lines that stay as they are
    logging.basicConfig(format="%(message)s")
    logging.getLogger("ckptsurg").setLevel(logging.INFO)


for command in (
    *(inspect, init, check, plan, rewrite, convert, manifest),
    *(verify, diff, report, attest, schema, demo),
):
    cli.add_command(command)
