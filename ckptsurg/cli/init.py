"""The command that drafts a spec."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import click

from .completion import complete_names

__all__ = ["init"]


@click.command()
@click.argument("ckpt", type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--output",
    "out",
    metavar="SPEC",
    type=click.Path(path_type=Path),
    help="Write it here, and beside it the schema that editors complete it by. Default: print it.",
)
@click.option(
    "--freeze-all-but",
    metavar="PATTERN",
    multiple=True,
    shell_complete=complete_names,
    help="What trains; may be given several times. Default: the head.",
)
@click.option("--new-head", metavar="N", type=click.IntRange(min=1), help="Draw the head anew, with N outputs.")
@click.option(
    "--head",
    metavar="PATTERN",
    shell_complete=complete_names,
    help="Which layer is the head. Default: told from names and shapes.",
)
@click.option("--name", metavar="TEXT", help="What the spec is called. Default: as the checkpoint.")
@click.option("--schema", metavar="REF", help="Name this schema, a path from SPEC or an address, and write none.")
@click.option("--overwrite", is_flag=True, help="Replace an earlier spec.")
@click.option(
    "--model",
    metavar="MODULE:FUNCTION",
    help="Makes the model of Keras to which a file of weights alone belongs.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the spec alone as JSON, without comments and examples.")
def init(
    ckpt: Path,
    out: Path | None,
    freeze_all_but: tuple[str, ...],
    new_head: int | None,
    head: str | None,
    name: str | None,
    schema: str | None,
    overwrite: bool,
    model: str | None,
    as_json: bool,
) -> None:
    """Draft a spec for a checkpoint, with comments and examples.

    It is YAML, and the examples fit this checkpoint. Of safetensors only headers are read.
    """
    from ..coercing import opened_with
    from ..drafts import draft_spec, place_for_draft

    publish = None if out is None else place_for_draft(out, overwrite=overwrite, with_schema=schema is None)
    with opened_with(model, ckpt) as [base]:
        draft = draft_spec(base, freeze_all_but=freeze_all_but, new_head=new_head, head=head, name=name, schema=schema)
    written = [] if publish is None else publish(draft)
    if as_json:
        import yaml

        click.echo(json.dumps(yaml.safe_load(draft), indent=2))
    elif out is None:
        click.echo(draft, nl=False)
    else:
        for what, path in zip(("spec", "schema"), written, strict=False):
            click.echo(f"{what:<12} {path}")
        click.echo(f"{'next':<12} ckptsurg plan {shlex.quote(str(out))} {shlex.quote(str(ckpt))}")
