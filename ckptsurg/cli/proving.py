"""The commands that prove and state.

What they need is imported inside them, so that ``--help`` answers at once.
"""

from __future__ import annotations

from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import CkptsurgError, ManifestError, UsageError
from ..wording import shown
from .completion import complete_names_of_manifest
from .options import (
    argument,
    jobs_option,
    json_option,
    model_option,
    overwrite_option,
    path_option,
    print_document,
)

if TYPE_CHECKING:
    from ..manifest import Manifest

__all__ = ["attest", "diff", "verify"]


@click.command()
@argument("manifest")
@argument("ckpt")
@path_option("--baseline", metavar="CKPT", help="The published checkpoint: compared, not hashed; shows where.")
@click.option("--root", metavar="DIGEST", help="The manifest's root or frozen_root, if it is pinned.")
@path_option("--attestation", metavar="FILE", help="The statement by attest, its signature checked: pins the manifest.")
@path_option("--statement", metavar="FILE", help="Write what was found, for others to sign.")
@click.option("--overwrite", is_flag=True, help="Replace an earlier --statement.")
@path_option("--junit", metavar="FILE", help="Write JUnit XML in place of an earlier one, whatever comes of it.")
@path_option("--markdown", metavar="FILE", help="Append a summary, as to $GITHUB_STEP_SUMMARY.")
@click.option("--exact", is_flag=True, help="Tensors that are extra, missing or of another shape count as differences.")
@click.option("--prefix", metavar="P", help="Take P off the names in CKPT.")
@path_option("--names", metavar="MAP", help="A JSON or YAML map from names in CKPT to names in the manifest.")
@click.option("--allow-widened", is_flag=True, help="Accept the same values in a wider dtype.")
@click.option(
    "--expect-trained",
    is_flag=True,
    help="A trainable tensor that did not move, or has another shape, is a difference.",
)
@click.option(
    "--only",
    metavar="PATTERN",
    multiple=True,
    shell_complete=complete_names_of_manifest,
    help="Look at what PATTERN selects alone; of several the later wins.",
)
@jobs_option
@model_option
@json_option
def verify(
    manifest: Path,
    ckpt: Path,
    baseline: Path | None,
    root: str | None,
    attestation: Path | None,
    statement: Path | None,
    overwrite: bool,
    junit: Path | None,
    markdown: Path | None,
    exact: bool,
    prefix: str | None,
    names: Path | None,
    allow_widened: bool,
    expect_trained: bool,
    only: tuple[str, ...],
    jobs: int | None,
    model: str | None,
    as_json: bool,
) -> int:
    """Prove that the frozen tensors of a checkpoint have their bits.

    Exit codes: 0 every one has; 1 one has not; 2 bad usage or manifest; 3 a malformed checkpoint; 4 the system failed.
    MANIFEST may also be the output, file or folder, that it stands by.
    Started by torchrun, as `torchrun ... -m ckptsurg verify ...`, all its processes read a part of it each.
    """
    from ..coercing import opened_with
    from ..proofs import load_names, place_for_statement, verify, verify_and_attest
    from . import rendering
    from .launched import launched
    from .results import results

    paths = [ckpt] if baseline is None else [ckpt, baseline]
    with launched() as ranks, ExitStack() as stack:
        if not (is_first := ranks.rank == 0):  # what all have found, the first one says
            junit = markdown = None
        conclude = stack.enter_context(results(junit, markdown, ckpt))
        publish = place_for_statement(statement, overwrite=overwrite) if statement is not None and is_first else None
        document = ranks.broadcast(lambda: _manifest_of(manifest, ckpt))
        with opened_with(model, *paths) as [trained, *before], rendering.progress("verify") as advance:
            asked: dict[str, Any] = {
                "baseline": before[0] if before else None,
                "names": None if names is None else ranks.broadcast(lambda: load_names(names)),
                "prefix": prefix,
                "root": root,
                "attestation": attestation,
                "exact": exact,
                "allow_widened": allow_widened,
                "expect_trained": expect_trained,
                "only": only or None,
                "jobs": jobs,
                "progress": advance if is_first else None,
                "group": ranks,
            }
            if statement is None:
                result, stated = verify(document, trained, **asked), b""
            else:
                result, stated = verify_and_attest(document, trained, **asked)
        ranks.gather(lambda: None)  # what has changed while it was read is found by now
        if publish is not None:
            publish(stated)
        conclude(result, document, manifest, exact=exact, allow_widened=allow_widened)
    if is_first and as_json:
        print_document(result)
    elif is_first:
        rendering.show_report(result, exact=exact)
    return 0 if result.ok else 1


def _manifest_of(manifest: Path, ckpt: Path) -> Manifest:
    """The manifest; where there is none, and the checkpoint is one or has one, the two were given the other way."""
    from ..coercing import as_manifest

    try:
        return as_manifest(manifest)
    except (ManifestError, UsageError) as error:
        with suppress(CkptsurgError):
            as_manifest(ckpt)
            error.hint = f"the manifest comes first: ckptsurg verify {shown(ckpt)} {shown(manifest)}"
        raise


@click.command()
@argument("manifest")
@argument("ckpt")
@path_option("-o", "--output", "out", required=True, help="The statement to write.")
@overwrite_option
@jobs_option
@json_option
def attest(manifest: Path, ckpt: Path, out: Path, overwrite: bool, jobs: int | None, as_json: bool) -> None:
    """State what an output is, for others to sign.

    It is an in-toto Statement, with the sha256 of each of its files. CKPT is the output that MANIFEST was published
    with; every tensor is compared with it first.
    """
    from ..proofs import attest, place_for_statement
    from . import rendering

    publish = place_for_statement(out, overwrite=overwrite)
    with rendering.progress("attest") as advance:
        statement = attest(manifest, ckpt, jobs=jobs, progress=advance)
    publish(statement)
    if as_json:
        click.echo(statement.decode())
    else:
        click.echo(f"statement    {out}")


@click.command()
@argument("a")
@argument("b")
@jobs_option
@model_option
@json_option
def diff(a: Path, b: Path, jobs: int | None, model: str | None, as_json: bool) -> int:
    """Compare two checkpoints, tensor by tensor, bit by bit.

    Exit codes: 0 identical; 1 different; 2 bad usage; 3 a malformed checkpoint; 4 the system failed.
    """
    from ..coercing import opened_with
    from ..proofs import diff
    from . import rendering

    with opened_with(model, a, b) as [one, other], rendering.progress("diff") as advance:
        result = diff(one, other, jobs=jobs, progress=advance)
    if as_json:
        print_document(result)
    else:
        rendering.show_diff(result)
    return 0 if result.ok else 1
