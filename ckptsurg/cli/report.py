"""The command that writes a page."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .places import Place

if TYPE_CHECKING:
    from ..urls import URL

__all__ = ["report"]

_PATH, _CHECKPOINT = Place(remote=False), Place(remote=True)


@click.command()
@click.argument("first", type=_PATH)
@click.argument("second", type=_CHECKPOINT, required=False)
@click.option("-o", "--output", "out", type=_PATH, required=True, help="The page to write.")
@click.option("--overwrite", is_flag=True, help="Replace an earlier page.")
@click.option(
    "--baseline", metavar="CKPT", type=_CHECKPOINT, help="The published checkpoint: shows by how much tensors moved."
)
@click.option(
    "--donor",
    metavar="NAME=CKPT",
    multiple=True,
    help="A checkpoint that tensors are grafted from, by its name in SPEC.",
)
@click.option("--root", metavar="DIGEST", help="The manifest's root or frozen_root, if it is pinned.")
@click.option("--exact", is_flag=True, help="Extra tensors and missing trainable ones count as differences.")
@click.option("--prefix", metavar="P", help="Take P off the names in SECOND.")
@click.option(
    "--names", metavar="MAP", type=_PATH, help="A JSON or YAML map from names in SECOND to names in the manifest."
)
@click.option("--allow-widened", is_flag=True, help="Accept the same values in a wider dtype.")
@click.option("--expect-trained", is_flag=True, help="A trainable tensor that did not move is a difference.")
@click.option(
    "--jobs", metavar="N", type=click.IntRange(1, 1024), help="How many threads. Default: one a core, up to 64."
)
@click.option(
    "--model", metavar="MODULE:FUNCTION", help="Makes the model of Keras to which a file of weights alone belongs."
)
@click.option("--json", "as_json", is_flag=True, help="Print the document that the page is of, on standard output.")
def report(
    first: Path,
    second: Path | URL | None,
    out: Path,
    overwrite: bool,
    donor: tuple[str, ...],
    jobs: int | None,
    model: str | None,
    as_json: bool,
    **options: Any,
) -> int:
    """Write a page to look at: one HTML file that fetches nothing.

    \b
    report SPEC CKPT          what a rewrite would do, block by block
    report MANIFEST           what an output is
    report MANIFEST CKPT      what verify finds: what moved, where, by how much, and why
    report CKPT CKPT          what diff finds, likewise

    MANIFEST may also be the output, file or folder, that it stands by: then changes are measured from its tensors, as
    from --baseline. Exit codes are those of plan, verify and diff: 1 if a difference was found. The page is written in
    either case.
    """  # noqa: D301 - \b is click's mark for lines that stay as they are
    from ..coercing import as_donors, opened_with
    from ..pages import composing, rendering
    from ..proofs import load_names
    from ..publishing import publish_document
    from ..wording import shown
    from . import rendering as terminal

    place = rendering.place_for(out, overwrite=overwrite)
    subject = composing.checked_subject(first, second is not None, options, donor)
    baseline: Path | URL | None = options.pop("baseline")
    if (names := options.pop("names")) is not None:
        options["names"] = load_names(names)
    paths = [path for path in (second, baseline, first if subject == "checkpoint" else None) if path is not None]
    with opened_with(model, *paths) as opened, terminal.progress("report") as advance:
        given = dict(zip(paths, opened, strict=True))
        if second is None:
            composed = composing.compose_output(first)
        elif subject == "spec":
            composed = composing.compose_plan(first, given[second], str(second), as_donors(donor))
        elif subject == "output":
            before = None if baseline is None else given[baseline]
            composed = composing.compose_comparison(
                first, given[second], str(second), baseline=before, jobs=jobs, progress=advance, **options
            )
        else:
            labels = str(first), str(second)
            composed = composing.compose_diff(given[first], given[second], labels, jobs=jobs, progress=advance)
    publish_document(rendering.render(composed.page), place, overwrite=overwrite)
    if as_json:
        click.echo(composed.document.to_json())
    else:
        click.echo(composed.page.verdict)
        click.echo(f"page         {shown(place)}")
    return 0 if composed.ok else 1
