"""All commands, in the order in which they are shown."""

from __future__ import annotations

import logging
from typing import Any

import click

from .check import check
from .init import init
from .proving import attest, diff, verify
from .report import report
from .surgery import convert, demo, inspect, manifest, plan, rewrite, schema

__all__ = ["ReaderGone", "cli"]


class ReaderGone(Exception):
    """Nobody reads standard output any more. Click would exit with 1, which is what a difference exits with."""


class _Commands(click.Group):
    def list_commands(self, context: click.Context) -> list[str]:
        return list(self.commands)

    def invoke(self, context: click.Context) -> Any:
        try:
            return super().invoke(context)
        except BrokenPipeError:
            raise ReaderGone from None


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="ckptsurg", message="%(prog)s %(version)s")
def cli() -> None:
    """Declarative surgery on model checkpoints, with proof that frozen weights stayed frozen.

    A checkpoint (CKPT) is a .safetensors file, a model folder, or the index of a sharded checkpoint; also a PyTorch
    archive (.pt, .pth, .bin), a folder of torch.distributed.checkpoint, or a file of Keras (.keras, .weights.h5, .h5).
    What is written is always safetensors.

    \b
    Exit codes: 0 done, or identical; 1 verify or diff found a difference; 2 bad usage, spec or manifest;
    3 a checkpoint that is malformed; 4 the system failed; 130 interrupted.
    """  # noqa: D301 - \b is click's mark for lines that stay as they are
    logging.basicConfig(format="%(message)s")
    logging.getLogger("ckptsurg").setLevel(logging.INFO)


for command in (
    *(inspect, init, check, plan, rewrite, convert, manifest),
    *(verify, diff, report, attest, schema, demo),
):
    cli.add_command(command)
