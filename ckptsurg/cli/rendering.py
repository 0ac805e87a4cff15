"""How results look on a terminal. Results go to standard output, progress to standard error."""

from __future__ import annotations

import json
import os
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..causes import explained
from ..wording import counted, enumerate_names, shown, size

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from ..inspection import Inspection
    from ..manifest import Manifest
    from ..plans import Plan, PlannedTensor
    from ..report import Difference, DiffReport, Report
    from ..spec import Spec

__all__ = [
    "progress",
    "show_converted",
    "show_diff",
    "show_inspection",
    "show_manifest",
    "show_plan",
    "show_report",
]

_ROWS = 40


def _console() -> Console:
    from rich.console import Console

    class Plain(Console):
        def on_broken_pipe(self) -> None:
            raise BrokenPipeError  # rich would exit with 1, which is what a difference exits with

    # Into a pipe nothing is wrapped: the reader is a program or a pager.
    return Plain(highlight=False, markup=False, emoji=False, width=None if sys.stdout.isatty() else 200)


def _fits(console: Console, table: Table) -> bool:
    """Whether a table has room for all that is in it."""
    unlimited = console.options.update(max_width=100_000)
    return console.measure(table, options=unlimited).maximum <= console.width


def elements(count: float) -> str:
    """``25.6 M``."""
    for unit in ("", " k", " M"):
        if count < 1000:
            return f"{count:.0f}" if not unit else f"{count:.1f}{unit}"
        count /= 1000
    return f"{count:.1f} B"


@contextmanager
def progress(task: str) -> Iterator[Callable[[int, int], None] | None]:
    """A bar with bytes, bytes a second and the time left, on standard error if that is a terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn(task), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=Console(stderr=True), transient=True)
    identifier = bar.add_task(task, total=None)

    def advance(done: int, total: int) -> None:
        bar.start()  # only now, so that what is said before stands above it; again, it does nothing
        bar.update(identifier, completed=done, total=total)

    try:
        yield advance
    finally:
        bar.stop()


# --- inspect ----------------------------------------------------------------------------------------


def show_inspection(inspection: Inspection, label: str) -> None:
    from rich.text import Text
    from rich.tree import Tree

    from ..layers import LAYERS_KEY, from_metadata
    from .tree import Node, build

    def add(tree: Tree, node: Node) -> None:
        children = node.folded()
        for text, child in children[:_ROWS]:
            line = Text(shown(text))
            if child.info is not None:
                line.append(f"  {child.info}", style="cyan")
                line.append(f"  {size(child.info.nbytes)}", style="dim")
            else:
                copies = f"{child.copies} x " if child.copies > 1 else ""
                line.append(f"  {copies}{elements(child.elements)} elements, {size(child.nbytes)}", style="dim")
            add(tree.add(line), child)
        if len(children) > _ROWS:
            tree.add(Text(f"... and {len(children) - _ROWS:,} more; give a pattern to see them", style="yellow"))

    root = build(inspection.infos)
    head = Text(shown(label), style="bold")
    head.append(
        f"  {counted(len(inspection.tensors))}, {elements(root.elements)} elements, {size(root.nbytes)}"
        f" in {counted(len(inspection.files), 'file')}",
        style="not bold",
    )
    tree = Tree(head, guide_style="dim")
    add(tree, root)
    _console().print(tree)
    if layers := from_metadata(inspection.metadata):
        order = enumerate_names([layer.name for layer in layers])
        _console().print(Text(f"layers in their order, {len(layers):,}: {order}", style="dim"), soft_wrap=True)
    metadata = {key: value for key, value in inspection.metadata.items() if key != LAYERS_KEY}
    for key, value in list(metadata.items())[:_ROWS]:
        _console().print(Text(f"metadata {shown(key)}: {shown(value, 100)}", style="dim"))


# --- plan -------------------------------------------------------------------------------------------

_FATES = {
    ("copy", True): ("frozen", "cyan"),
    ("copy", False): ("trains", "green"),
    ("drop", False): ("dropped", "red"),
    ("reinit", False): ("drawn, trains", "yellow"),
    ("reinit", True): ("drawn, frozen", "yellow"),
    ("add", False): ("added, trains", "magenta"),
    ("add", True): ("added, frozen", "magenta"),
}


def show_plan(spec: Spec, plan: Plan) -> None:
    from rich.table import Table
    from rich.text import Text

    groups: dict[tuple[str, bool, str | None, bool], list[PlannedTensor]] = defaultdict(list)
    for tensor in plan.tensors:
        groups[tensor.action, tensor.frozen, tensor.rule, tensor.rows is not None].append(tensor)
    order = list(_FATES)
    rows = []
    total = 0
    for (action, frozen, rule, in_part), tensors in sorted(groups.items(), key=lambda item: order.index(item[0][:2])):
        fate, style = ("frozen in part", "cyan") if in_part else _FATES[action, frozen]
        infos = [tensor.info for tensor in tensors]
        sizes = [info.nbytes for info in infos]
        total += sum(sizes) if action != "drop" else 0
        rows.append(
            (
                Text(fate, style=style),
                rule or "",
                shown(spec.pattern_at(rule), 40) if rule else "",
                f"{len(tensors):,}",
                elements(sum(info.elements for info in infos)),
                size(sum(sizes)),
                shown(tensors[sizes.index(max(sizes))].name, 60),
            )
        )
    console = _console()
    headings = ("fate", "rule", "pattern", "tensors", "elements", "size", "for example")
    for columns in (headings, headings[:-1]):  # where there is little room, counts come before examples
        table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
        for heading in columns:
            numbers = heading in ("tensors", "elements", "size")
            table.add_column(heading, justify="right" if numbers else "left", no_wrap=heading != "pattern")
        for row in rows:
            table.add_row(*row[: len(columns)])
        if _fits(console, table):
            break
    console.print(table)
    output = plan.output
    drawn = [tensor for tensor in output if tensor.init is not None]
    with_rows = [tensor for tensor in output if tensor.rows is not None]
    if drawn or with_rows:
        console.print()
    for tensor in drawn[:_ROWS]:
        line = Text(f"{shown(tensor.name)}  ")
        if tensor.old_shape not in (None, tensor.shape):
            line.append(f"{list(tensor.old_shape or ())} -> ", style="dim")
        line.append(f"{tensor.info}", style="cyan").append(f"  {_initializer(tensor)}")
        console.print(line, soft_wrap=True)
    if len(drawn) > _ROWS:
        console.print(f"... and {len(drawn) - _ROWS:,} more; --json lists all")
    for tensor in with_rows[:_ROWS]:
        assert tensor.rows is not None
        console.print(
            f"{shown(tensor.name)}  rows {tensor.rows[0]:,} to {tensor.rows[1] - 1:,} are frozen, the rest trains"
        )
    for path, value in (spec.config.set if spec.config else {}).items():
        console.print(f"config.json  {shown(path)} = {shown(json.dumps(value), 100)}", soft_wrap=True)
    for path in spec.config.unset if spec.config else ():
        console.print(f"config.json  {shown(path)} goes", soft_wrap=True)
    console.print()
    partly = len(with_rows)
    said = f"{plan.counts['frozen'] - partly:,} frozen" + (f", {partly:,} in part" if partly else "")
    console.print(f"output: {counted(len(output))}, {size(total)}; {said}, {plan.counts['trainable']:,} trainable")
    for note in plan.notes:
        console.print(Text("note: ", style="yellow").append(note, style="default"), soft_wrap=True)


def _initializer(tensor: PlannedTensor) -> str:
    """``normal(mean=0, std=0.02)``, with what is kept."""
    assert tensor.init is not None
    arguments = ", ".join(
        f"{key}={value:.6g}" if isinstance(value, float) else f"{key}={value}"
        for key, value in tensor.init.arguments.items()
    )
    return f"{tensor.init.name}({arguments})" + (", what overlaps is kept" if tensor.keep else "")


# --- rewrite, manifest ------------------------------------------------------------------------------


def show_converted(inspection: Inspection, out: Path) -> None:
    """What a change of container published."""
    click.echo(f"published    {shown(out)}")
    total = sum(info.nbytes for info in inspection.infos.values())
    files = counted(len(inspection.files), "file")
    click.echo(f"content      {counted(len(inspection.tensors))}, {size(total)} in {files}")


def show_manifest(manifest: Manifest, out: Path | None, manifest_at: Path | None) -> None:
    from ..manifest import manifest_path

    counts = manifest.counts
    total = sum(record.info.nbytes for record in manifest.tensors.values())
    said = ", ".join(
        f"{counts[key]:,} {key}" for key in ("frozen", "trainable", "reinitialised", "added", "dropped") if counts[key]
    )
    if out is not None:
        click.echo(f"published    {shown(out)}")
    click.echo(f"content      {counted(len(manifest.tensors))}, {size(total)}: {said}")
    place = manifest_at or (manifest_path(out) if out is not None else None)
    click.echo(f"manifest     {shown(place)}")
    click.echo(f"root         {manifest.root}")
    click.echo(f"frozen_root  {manifest.frozen_root}")


# --- verify, diff -----------------------------------------------------------------------------------


def _echo(good: str, rest: str = "") -> None:
    click.echo(click.style(good, fg="green", bold=True) + rest, color=False if os.environ.get("NO_COLOR") else None)


def show_report(report: Report, *, exact: bool = False) -> None:
    if report.ok and not (report.drifted or report.extra or report.missing_trainable or report.note):
        # One line, which is what most runs end in, does not wait for rich.
        _echo("ok     ", _summary(report))
        return
    from rich.text import Text

    console = _console()
    word, style = ("ok     ", "bold green") if report.ok else ("FAILED ", "bold red")
    summary = Text(word, style=style).append(_summary(report), "default")
    console.print(summary, soft_wrap=True)
    failed = [difference for difference in report.drifted if difference.verdict != "dtype_only" or not report.ok]
    nothing_there = not report.verified and all(difference.verdict == "missing" for difference in failed)
    if report.drifted and not nothing_there:
        _show_differences(console, report.drifted)
    for code in sorted({difference.cause for difference in failed if difference.cause}):
        console.print(explained(code), soft_wrap=not console.is_terminal)
    hints = {difference.hint for difference in failed if difference.hint}
    if any(difference.verdict == "changed" and difference.detail is None for difference in failed):
        hints.add("--baseline CKPT, the published output, shows where tensors differ and by how much")
    elif any(difference.verdict == "changed" and difference.cause is None for difference in failed):
        watching = "ckptsurg.watch(model, manifest=...) around the training sees more, with Keras FreezeCallback"
        hints.add(f"files alone do not settle why; {watching}")
    for hint in sorted(hints):
        console.print(f"hint: {hint}", soft_wrap=not console.is_terminal)
    listed = (
        (report.extra, "not in the manifest", exact),
        (report.missing_trainable, "trainable, and missing", exact),
        (report.untrained or (), "trainable, and did not move", True),
    )
    for names, what, counts in listed:
        if names:
            style = "red" if counts else "dim"
            console.print(
                Text(f"{counted(len(names))} {what}: {enumerate_names(names)}", style=style),
                soft_wrap=not console.is_terminal,
            )
    if report.note:
        console.print(f"note: {report.note}", soft_wrap=not console.is_terminal)
    if len(report.drifted) > _ROWS // 2 and not nothing_there:
        console.print(summary, soft_wrap=True)  # the first line is off the screen by now


_VOUCHERS = {
    "pinned": "the manifest is pinned",
    "signed": "the manifest is that of the statement",
    None: "nothing pins the manifest",
}


def _summary(report: Report) -> str:
    verified = counted(report.verified, "frozen tensor")
    missing = sum(difference.verdict == "missing" for difference in report.drifted)
    drifted = sum(difference.verdict != "missing" for difference in report.drifted)
    if report.ok and report.drifted:
        return f"{verified} verified, {drifted:,} in a wider dtype"
    if report.ok:
        return f"{verified} verified: every one has its bits ({_VOUCHERS[report.relied_on]})"
    if not report.drifted and report.untrained:
        return f"{verified} verified, but {counted(len(report.untrained), 'trainable tensor')} did not move"
    if not report.drifted:
        return f"{verified} verified, but there are others than the manifest's"
    if not report.verified and not drifted:
        if any(difference.cause == "not_saved" for difference in report.drifted):
            return f"none of the manifest's {counted(missing, 'frozen tensor')} is there: what trains was saved alone"
        return f"none of the manifest's {counted(missing, 'frozen tensor')} is there: is it this model's manifest?"
    counts = ((drifted, "drifted"), (missing, "missing"))
    parts = [f"{counted(count, 'frozen tensor')} {what}" for count, what in counts if count]
    return f"{', '.join(parts)}, {report.verified:,} verified"


def show_diff(report: DiffReport) -> None:
    if report.ok:
        _echo("identical")
        return
    from rich.text import Text

    console = _console()
    console.print(
        Text(f"{counted(len(report.tensors))} {'differs' if len(report.tensors) == 1 else 'differ'}", style="bold red")
    )
    _show_differences(console, report.tensors)


def _show_differences(console: Console, differences: Sequence[Difference]) -> None:
    """A table; where it would not fit, a tensor's name and below it what there is to say."""
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    caused = any(difference.cause for difference in differences)
    for heading in ("tensor", "verdict", *(["cause"] if caused else []), "detail"):
        table.add_column(heading, no_wrap=True, overflow="fold")
    rows = [
        (shown(one.name), one.verdict, *([one.cause or "unknown"] if caused else []), one.describe_detail())
        for one in differences[:_ROWS]
    ]
    for row in rows:
        table.add_row(*row)
    if len(differences) > _ROWS:
        table.add_row(f"... and {len(differences) - _ROWS:,} more; --json lists all")
    if _fits(console, table):
        console.print(table)
        return
    for name, *rest in rows:
        console.print(name, soft_wrap=True)
        console.print(f"  {'  '.join(part for part in rest if part)}", soft_wrap=True)
    if len(differences) > _ROWS:
        console.print(f"... and {len(differences) - _ROWS:,} more; --json lists all")
