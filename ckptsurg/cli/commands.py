"""The commands. What they need is imported inside them, so that ``--help`` answers at once."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from .check import check
from .completion import complete_names, complete_names_of_manifest
from .init import init
from .places import Place

if TYPE_CHECKING:
    from ..documents import Document

__all__ = ["ReaderGone", "cli"]

_Command = TypeVar("_Command", bound=Callable[..., Any])

#: What may be on another machine.
_CHECKPOINTS = ("a", "b", "ckpt", "src", "--baseline")


def _argument(name: str, **options: Any) -> Callable[[_Command], _Command]:
    return click.argument(name, type=Place(remote=name in _CHECKPOINTS), **options)


def _path_option(*names: str, **options: Any) -> Callable[[_Command], _Command]:
    return click.option(*names, type=Place(remote=names[0] in _CHECKPOINTS), **options)


_json = click.option("--json", "as_json", is_flag=True, help="Print the document alone, on standard output.")
_digest = click.option(
    "--digest", type=click.Choice(["blake3", "sha256"]), default="blake3", show_default=True, help="Digest algorithm."
)
_model = click.option(
    "--model",
    metavar="MODULE:FUNCTION",
    help="Makes the model of Keras to which a file of weights alone belongs.",
)
_overwrite = click.option("--overwrite", is_flag=True, help="Replace an earlier output.")
_max_shard_size = click.option(
    "--max-shard-size", metavar="SIZE", help="Split anew: 5GB, 500MB or bytes. Default: the base's shards."
)
_keep_other_weights = click.option(
    "--keep-other-weights", is_flag=True, help="Bring other files of weights in the base's folder along."
)
_link = click.option(
    "--link", is_flag=True, help="Hard-link shards that stay as they are: whoever writes to one then writes to both."
)
_trust_base_manifest = click.option(
    "--trust-base-manifest",
    is_flag=True,
    help="Take digests of copied tensors from the manifest that CKPT was published with.",
)
_donor = click.option(
    "--donor",
    metavar="NAME=CKPT",
    multiple=True,
    help="A checkpoint that tensors are grafted from, by its name in SPEC.",
)
_jobs = click.option(
    "--jobs", metavar="N", type=click.IntRange(1, 1024), help="How many threads. Default: one a core, up to 64."
)


class ReaderGone(Exception):
    """Nobody reads standard output any more. Click would exit with 1, which is what a difference exits with."""


class _Commands(click.Group):
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


@cli.command()
@_argument("ckpt")
@click.argument("patterns", metavar="[PATTERN]...", nargs=-1, shell_complete=complete_names)
@_model
@_json
def inspect(ckpt: Path, patterns: tuple[str, ...], model: str | None, as_json: bool) -> None:
    """Show the tree of modules, or what patterns select.

    Several patterns are a list as in a spec: the later one wins, and ! takes away.
    """
    from ..api import inspect
    from ..coercing import opened_with
    from . import rendering

    with opened_with(model, ckpt) as [base]:
        result = inspect(base, patterns)
    if as_json:
        _print_document(result)
    else:
        rendering.show_inspection(result, str(ckpt))


@cli.command()
@_argument("spec")
@_argument("ckpt")
@_path_option("-o", "--output", "out", metavar="PLAN", help="Keep the plan, for rewrite to carry out.")
@click.option("--overwrite", is_flag=True, help="Replace an earlier PLAN.")
@click.option("--explain", metavar="NAME", help="Say why a tensor has its fate: which patterns take it.")
@_donor
@_model
@_json
def plan(
    spec: Path,
    ckpt: Path,
    out: Path | None,
    overwrite: bool,
    explain: str | None,
    donor: tuple[str, ...],
    model: str | None,
    as_json: bool,
) -> None:
    """Show what a rewrite would do. Of safetensors only headers are read; nothing is written but PLAN."""
    from .. import api
    from ..coercing import as_donors, opened_with
    from . import planned

    donors = as_donors(donor)
    publish = None if out is None else api.place_for_plan(out, overwrite=overwrite)
    with opened_with(model, ckpt) as [base]:
        if explain is not None:
            explanation = api.explain(spec, base, explain, donors=donors)
        else:
            loaded, result = api.plan_with_spec(spec, base, donors=donors, reviewed=out is not None)
    if explain is not None:
        if as_json:
            click.echo(explanation.to_json())
        else:
            planned.show_explanation(explanation)
        return
    if publish is not None:
        publish(result.to_json().encode() + b"\n")
    if as_json:
        _print_document(result)
    else:
        planned.show_plan(loaded, result)


@cli.command()
@_argument("spec")
@_argument("ckpt")
@_path_option("-o", "--output", "out", required=True, help="A folder, or a file whose name ends in .safetensors.")
@_path_option("--manifest", help="Put the manifest here (a folder keeps its own as well).")
@_donor
@_overwrite
@_max_shard_size
@_digest
@_keep_other_weights
@_link
@_trust_base_manifest
@_jobs
@_model
@_json
def rewrite(
    spec: Path,
    ckpt: Path,
    out: Path,
    manifest: Path | None,
    donor: tuple[str, ...],
    overwrite: bool,
    max_shard_size: str | None,
    digest: str,
    keep_other_weights: bool,
    link: bool,
    trust_base_manifest: bool,
    jobs: int | None,
    model: str | None,
    as_json: bool,
) -> None:
    """Publish the checkpoint that a spec describes, and its manifest.

    SPEC may also be a plan that `plan -o` has kept: it is carried out as it is, on the same CKPT, or not at all.
    """
    from ..api import rewrite
    from ..coercing import as_donors, opened_with
    from . import rendering

    with opened_with(model, ckpt) as [base], rendering.progress("rewrite") as advance:
        result = rewrite(
            spec,
            base,
            out,
            donors=as_donors(donor),
            manifest=manifest,
            overwrite=overwrite,
            max_shard_size=max_shard_size,
            digest=digest,
            keep_other_weights=keep_other_weights,
            link=link,
            trust_base_manifest=trust_base_manifest,
            jobs=jobs,
            progress=advance,
        )
    if as_json:
        _print_document(result)
    else:
        rendering.show_manifest(result, out, manifest)


@cli.command()
@_argument("src")
@_argument("out")
@click.option("--overwrite", is_flag=True, help="Replace a file; a folder only if it holds a freeze.json.")
@_max_shard_size
@_keep_other_weights
@_link
@_jobs
@_model
@_json
def convert(
    src: Path,
    out: Path,
    overwrite: bool,
    max_shard_size: str | None,
    keep_other_weights: bool,
    link: bool,
    jobs: int | None,
    model: str | None,
    as_json: bool,
) -> None:
    """Publish a checkpoint as safetensors: the same tensors, bit by bit, in another container.

    OUT is a file if its name ends in .safetensors, else a folder.
    """
    from ..api import convert
    from ..coercing import opened_with
    from . import rendering

    with opened_with(model, src) as [base], rendering.progress("convert") as advance:
        result = convert(
            base,
            out,
            overwrite=overwrite,
            max_shard_size=max_shard_size,
            keep_other_weights=keep_other_weights,
            link=link,
            jobs=jobs,
            progress=advance,
        )
    if as_json:
        _print_document(result)
    else:
        rendering.show_converted(result, out)


@cli.command()
@_argument("spec")
@_argument("ckpt")
@_path_option("-o", "--output", "out", required=True, help="The manifest to write.")
@_overwrite
@_digest
@_trust_base_manifest
@_jobs
@_model
@_json
def manifest(
    spec: Path,
    ckpt: Path,
    out: Path,
    overwrite: bool,
    digest: str,
    trust_base_manifest: bool,
    jobs: int | None,
    model: str | None,
    as_json: bool,
) -> None:
    """Write the manifest of a checkpoint that is trained as it is."""
    from ..api import make_manifest, place_for_manifest
    from ..coercing import opened_with
    from . import rendering

    publish = place_for_manifest(out, overwrite=overwrite)
    with opened_with(model, ckpt) as [base], rendering.progress("manifest") as advance:
        result = make_manifest(
            spec, base, digest=digest, trust_base_manifest=trust_base_manifest, jobs=jobs, progress=advance
        )
    publish(result.to_bytes())
    if as_json:
        _print_document(result)
    else:
        rendering.show_manifest(result, None, out)


@cli.command()
@_argument("manifest")
@_argument("ckpt")
@_path_option("--baseline", metavar="CKPT", help="The published checkpoint: compared, not hashed; shows where.")
@click.option("--root", metavar="DIGEST", help="The manifest's root or frozen_root, if it is pinned.")
@_path_option(
    "--attestation", metavar="FILE", help="The statement by attest, its signature checked: pins the manifest."
)
@_path_option("--statement", metavar="FILE", help="Write what was found, for others to sign.")
@click.option("--overwrite", is_flag=True, help="Replace an earlier --statement.")
@_path_option("--junit", metavar="FILE", help="Write JUnit XML in place of an earlier one, whatever comes of it.")
@_path_option("--markdown", metavar="FILE", help="Append a summary, as to $GITHUB_STEP_SUMMARY.")
@click.option("--exact", is_flag=True, help="Extra tensors and missing trainable ones count as differences.")
@click.option("--prefix", metavar="P", help="Take P off the names in CKPT.")
@_path_option("--names", metavar="MAP", help="A JSON or YAML map from names in CKPT to names in the manifest.")
@click.option("--allow-widened", is_flag=True, help="Accept the same values in a wider dtype.")
@click.option("--expect-trained", is_flag=True, help="A trainable tensor that did not move is a difference.")
@click.option(
    "--only",
    metavar="PATTERN",
    multiple=True,
    shell_complete=complete_names_of_manifest,
    help="Look at what PATTERN selects alone; of several the later wins.",
)
@_jobs
@_model
@_json
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
    """Prove that every frozen tensor of a trained checkpoint has its bits.

    Exit codes: 0 every one has; 1 one has not; 2 bad usage or manifest; 3 a malformed checkpoint; 4 the system failed.
    MANIFEST may also be the output, file or folder, that it stands by.
    """
    from ..coercing import as_manifest, opened_with
    from ..proofs import load_names, place_for_statement, verify, verify_and_attest
    from . import rendering
    from .results import results

    paths = [ckpt] if baseline is None else [ckpt, baseline]
    with results(junit, markdown, ckpt) as conclude:
        publish = None if statement is None else place_for_statement(statement, overwrite=overwrite)
        document = as_manifest(manifest)
        with opened_with(model, *paths) as [trained, *before], rendering.progress("verify") as advance:
            asked: dict[str, Any] = {
                "baseline": before[0] if before else None,
                "names": None if names is None else load_names(names),
                "prefix": prefix,
                "root": root,
                "attestation": attestation,
                "exact": exact,
                "allow_widened": allow_widened,
                "expect_trained": expect_trained,
                "only": only or None,
                "jobs": jobs,
                "progress": advance,
            }
            if publish is None:
                result = verify(document, trained, **asked)
            else:
                result, stated = verify_and_attest(document, trained, **asked)
                publish(stated)
        conclude(result, document, manifest, exact=exact, allow_widened=allow_widened)
    if as_json:
        _print_document(result)
    else:
        rendering.show_report(result, exact=exact)
    return 0 if result.ok else 1


@cli.command()
@_argument("manifest")
@_argument("ckpt")
@_path_option("-o", "--output", "out", required=True, help="The statement to write.")
@_overwrite
@_jobs
@_json
def attest(manifest: Path, ckpt: Path, out: Path, overwrite: bool, jobs: int | None, as_json: bool) -> None:
    """State what an output is, for others to sign: an in-toto Statement, with the sha256 of each of its files.

    CKPT is the output that MANIFEST was published with; every tensor is compared with it first.
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


@cli.command()
@_argument("a")
@_argument("b")
@_jobs
@_model
@_json
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
        _print_document(result)
    else:
        rendering.show_diff(result)
    return 0 if result.ok else 1


@cli.command()
@click.argument("document", type=click.Choice(["spec", "plan", "manifest", "report"]))
@click.option("--json", "as_json", is_flag=True, help="The schema is JSON in any case.")
def schema(document: str, as_json: bool) -> None:
    """Print the JSON Schema of a document."""
    import json

    from ..schemas import schema

    click.echo(json.dumps(schema(document), indent=2))


@cli.command()
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print the two reports alone, on standard output.")
def demo(folder: Path, as_json: bool) -> None:
    """Run the main job on real data: train, rewrite, fine-tune and verify a small network in DIR."""
    from ..errors import UsageError

    try:
        from .demo import run
    except ModuleNotFoundError as error:
        raise UsageError(
            f"the demo needs {error.name}, which is not installed", hint="pip install 'ckptsurg[demo]'"
        ) from None
    run(folder, as_json=as_json)


def _print_document(document: Document) -> None:
    click.echo(document.to_json())


for command in (check, init):
    cli.add_command(command)
