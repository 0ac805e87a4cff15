"""The commands that look at checkpoints, plan and write.

What they need is imported inside them, so that ``--help`` answers at once.
"""

from __future__ import annotations

from pathlib import Path

import click

from .completion import complete_names
from .options import (
    argument,
    digest_option,
    donor_option,
    jobs_option,
    json_option,
    keep_other_weights_option,
    link_option,
    max_shard_size_option,
    model_option,
    overwrite_option,
    path_option,
    print_document,
    trust_base_manifest_option,
)

__all__ = ["convert", "demo", "inspect", "manifest", "plan", "rewrite", "schema"]


@click.command()
@argument("ckpt")
@click.argument("patterns", metavar="[PATTERN]...", nargs=-1, shell_complete=complete_names)
@model_option
@json_option
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
        print_document(result)
    else:
        rendering.show_inspection(result, str(ckpt))


@click.command()
@argument("spec")
@argument("ckpt")
@path_option("-o", "--output", "out", metavar="PLAN", help="Keep the plan, for rewrite to carry out.")
@click.option("--overwrite", is_flag=True, help="Replace an earlier PLAN.")
@click.option("--explain", metavar="NAME", help="Say why a tensor has its fate: which patterns take it.")
@click.option("--ranks", type=click.IntRange(1), metavar="N", help="Say how torchrun with N processes would share it.")
@donor_option
@model_option
@json_option
def plan(
    spec: Path,
    ckpt: Path,
    out: Path | None,
    overwrite: bool,
    explain: str | None,
    ranks: int | None,
    donor: tuple[str, ...],
    model: str | None,
    as_json: bool,
) -> None:
    """Show what a rewrite would do. Of safetensors only headers are read; nothing is written but PLAN."""
    from .. import api
    from ..coercing import as_donors, opened_with
    from ..errors import UsageError
    from . import planned

    if ranks is not None and (as_json or explain is not None):
        raise UsageError("--ranks says something of a plan that is shown; leave out --json and --explain")
    donors = as_donors(donor)
    publish = None if out is None else api.place_for_plan(out, overwrite=overwrite)
    with opened_with(model, ckpt) as [base]:
        if explain is not None:
            explanation = api.explain(spec, base, explain, donors=donors)
        else:
            loaded, result = api.plan_with_spec(spec, base, donors=donors, reviewed=out is not None)
            deal = None if ranks is None else api.dealt(result, base, ranks, donors=donors)
    if explain is not None:
        if as_json:
            click.echo(explanation.to_json())
        else:
            planned.show_explanation(explanation)
        return
    if publish is not None:
        publish(result.to_json().encode() + b"\n")
    if as_json:
        print_document(result)
    else:
        planned.show_plan(loaded, result)
        if deal is not None:
            planned.show_deal(deal)


@click.command()
@argument("spec")
@argument("ckpt")
@path_option("-o", "--output", "out", required=True, help="A folder, or a file whose name ends in .safetensors.")
@path_option("--manifest", help="Put the manifest here (a folder keeps its own as well).")
@donor_option
@overwrite_option
@max_shard_size_option
@digest_option
@keep_other_weights_option
@link_option
@trust_base_manifest_option
@click.option("--resume", is_flag=True, help="Go on where a run that was stopped left off; if stopped, leave it so.")
@jobs_option
@model_option
@json_option
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
    resume: bool,
    jobs: int | None,
    model: str | None,
    as_json: bool,
) -> None:
    """Publish the checkpoint that a spec describes, and its manifest.

    SPEC may also be a plan that `plan -o` has kept: it is carried out as it is, on the same CKPT, or not at all.
    Started by torchrun, as `torchrun ... -m ckptsurg rewrite ...`, the work is dealt out to all its processes.
    """
    from ..api import rewrite
    from ..coercing import as_donors, opened_with
    from . import rendering
    from .launched import launched

    with launched() as ranks, opened_with(model, ckpt) as [base], rendering.progress("rewrite") as advance:
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
            resume=resume,
            jobs=jobs,
            progress=advance if ranks.rank == 0 else None,
            group=ranks,
        )
    if ranks.rank != 0:
        return
    if as_json:
        print_document(result)
    else:
        rendering.show_manifest(result, out, manifest)


@click.command()
@argument("src")
@argument("out")
@click.option("--overwrite", is_flag=True, help="Replace a file; a folder only if it holds a freeze.json.")
@max_shard_size_option
@keep_other_weights_option
@link_option
@jobs_option
@model_option
@json_option
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
    """Publish a checkpoint as safetensors, bit by bit.

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
        print_document(result)
    else:
        rendering.show_converted(result, out)


@click.command()
@argument("spec")
@argument("ckpt")
@path_option("-o", "--output", "out", required=True, help="The manifest to write.")
@overwrite_option
@digest_option
@trust_base_manifest_option
@jobs_option
@model_option
@json_option
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
        print_document(result)
    else:
        rendering.show_manifest(result, None, out)


@click.command()
@click.argument("document", type=click.Choice(["spec", "plan", "manifest", "report"]))
@click.option("--json", "as_json", is_flag=True, help="The schema is JSON in any case.")
def schema(document: str, as_json: bool) -> None:
    """Print the JSON Schema of a document."""
    import json

    from ..schemas import schema

    click.echo(json.dumps(schema(document), indent=2))


@click.command()
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print the two reports alone, on standard output.")
def demo(folder: Path, as_json: bool) -> None:
    """Run the main job on real data, with a small network, in DIR."""
    from ..errors import UsageError

    try:
        from .demo import run
    except ModuleNotFoundError as error:
        raise UsageError(
            f"the demo needs {error.name}, which is not installed", hint="pip install 'ckptsurg[demo]'"
        ) from None
    run(folder, as_json=as_json)
