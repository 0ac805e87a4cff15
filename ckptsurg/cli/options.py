"""Arguments and options that several commands have, and how a document is printed."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from .places import Place

if TYPE_CHECKING:
    from ..documents import Document

__all__ = [
    "argument",
    "digest_option",
    "donor_option",
    "jobs_option",
    "json_option",
    "keep_other_weights_option",
    "link_option",
    "max_shard_size_option",
    "model_option",
    "overwrite_option",
    "path_option",
    "print_document",
    "trust_base_manifest_option",
]

_Command = TypeVar("_Command", bound=Callable[..., Any])

#: What may be on another machine.
_CHECKPOINTS = ("a", "b", "ckpt", "src", "--baseline")


def argument(name: str, **options: Any) -> Callable[[_Command], _Command]:
    return click.argument(name, type=Place(remote=name in _CHECKPOINTS), **options)


def path_option(*names: str, **options: Any) -> Callable[[_Command], _Command]:
    return click.option(*names, type=Place(remote=names[0] in _CHECKPOINTS), **options)


json_option = click.option("--json", "as_json", is_flag=True, help="Print the document alone, on standard output.")
digest_option = click.option(
    "--digest", type=click.Choice(["blake3", "sha256"]), default="blake3", show_default=True, help="Digest algorithm."
)
model_option = click.option(
    "--model",
    metavar="MODULE:FUNCTION",
    help="Makes the model of Keras to which a file of weights alone belongs.",
)
overwrite_option = click.option("--overwrite", is_flag=True, help="Replace an earlier output.")
max_shard_size_option = click.option(
    "--max-shard-size", metavar="SIZE", help="Split anew: 5GB, 500MB or bytes. Default: the base's shards."
)
keep_other_weights_option = click.option(
    "--keep-other-weights", is_flag=True, help="Bring other files of weights in the base's folder along."
)
link_option = click.option(
    "--link", is_flag=True, help="Hard-link shards that stay as they are: whoever writes to one then writes to both."
)
trust_base_manifest_option = click.option(
    "--trust-base-manifest",
    is_flag=True,
    help="Take digests of copied tensors from the manifest that CKPT was published with.",
)
donor_option = click.option(
    "--donor",
    metavar="NAME=CKPT",
    multiple=True,
    help="A checkpoint that tensors are grafted from, by its name in SPEC.",
)
jobs_option = click.option(
    "--jobs", metavar="N", type=click.IntRange(1, 1024), help="How many threads. Default: one a core, up to 64."
)


def print_document(document: Document) -> None:
    click.echo(document.to_json())
