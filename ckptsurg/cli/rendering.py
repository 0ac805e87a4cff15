"""How results look on a terminal. Results go to standard output, progress to standard error."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..causes import UNSETTLED, explained
from ..summaries.outcomes import headline, next_steps, voucher
from ..wording import counted, enumerate_names, shown, size

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from ..inspection import Inspection
    from ..manifest import Manifest
    from ..report import Difference, DiffReport, Report

__all__ = [
    "ROWS",
    "console",
    "elements",
    "fits",
    "progress",
    "show_converted",
    "show_diff",
    "show_inspection",
    "show_manifest",
    "show_report",
]

ROWS = 40


def console() -> Console:
    """Standard output, as rich writes to it."""
    from rich.console import Console

    class Plain(Console):
        def on_broken_pipe(self) -> None:
            raise BrokenPipeError  # rich would exit with 1, which is what a difference exits with

    # Into a pipe nothing is wrapped: the reader is a program or a pager.
    return Plain(highlight=False, markup=False, emoji=False, width=None if sys.stdout.isatty() else 200)


def fits(screen: Console, table: Table) -> bool:
    """Whether a table has room for all that is in it."""
    unlimited = screen.options.update(max_width=100_000)
    return screen.measure(table, options=unlimited).maximum <= screen.width


def elements(count: float) -> str:
    """``25.6 M``."""
    for unit in ("", " k", " M"):
        if count < 1000:
            return f"{count:.0f}" if not unit else f"{count:.1f}{unit}"
        count /= 1000
    return f"{count:.1f} B"


@contextmanager
def progress(task: str, *, after: float = 0.5) -> Iterator[Callable[[int, int], None] | None]:
    """A bar with bytes, bytes a second and the time left, on standard error if that is a terminal.

    Args:
        task: What is under way.
        after: How long nothing is shown, in seconds: most runs are over by then.
    """
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn(task), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=Console(stderr=True), transient=True)
    identifier = bar.add_task(task, total=None)
    began: float | None = None

    def advance(done: int, total: int) -> None:
        nonlocal began
        began = time.monotonic() if began is None else began
        bar.update(identifier, completed=done, total=total)
        if time.monotonic() - began >= after and done < total:
            bar.start()  # again, it does nothing

    def make_way(_: logging.LogRecord) -> bool:
        bar.stop()  # what is said takes its place; it comes back below, if there is more to tell
        return True

    log = logging.getLogger("ckptsurg")
    log.addFilter(make_way)
    try:
        yield advance
    finally:
        log.removeFilter(make_way)
        bar.stop()


# --- inspect ----------------------------------------------------------------------------------------


def show_inspection(inspection: Inspection, label: str) -> None:
    from rich.text import Text
    from rich.tree import Tree

    from ..layers import LAYERS_KEY, from_metadata
    from .tree import Node, build

    def add(tree: Tree, node: Node) -> None:
        children = node.folded()
        for text, child in children[:ROWS]:
            line = Text(shown(text))
            if child.info is not None:
                line.append(f"  {child.info}", style="cyan")
                line.append(f"  {size(child.info.nbytes)}", style="dim")
            else:
                copies = f"{child.copies} x " if child.copies > 1 else ""
                line.append(f"  {copies}{elements(child.elements)} elements, {size(child.nbytes)}", style="dim")
            add(tree.add(line), child)
        if len(children) > ROWS:
            tree.add(Text(f"... and {len(children) - ROWS:,} more; give a pattern to see them", style="yellow"))

    root = build(inspection.infos)
    head = Text(shown(label), style="bold")
    head.append(
        f"  {counted(len(inspection.tensors))}, {elements(root.elements)} elements, {size(root.nbytes)}"
        f" in {counted(len(inspection.files), 'file')}",
        style="not bold",
    )
    tree = Tree(head, guide_style="dim")
    add(tree, root)
    console().print(tree)
    if layers := from_metadata(inspection.metadata):
        order = enumerate_names([layer.name for layer in layers])
        console().print(Text(f"layers in their order, {len(layers):,}: {order}", style="dim"), soft_wrap=True)
    metadata = {key: value for key, value in inspection.metadata.items() if key != LAYERS_KEY}
    for key, value in list(metadata.items())[:ROWS]:
        console().print(Text(f"metadata {shown(key)}: {shown(value, 100)}", style="dim"))


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
    asides = report.asides(exact=exact)
    if report.ok and not (report.drifted or asides or report.note):
        # One line, which is what most runs end in, does not wait for rich.
        _echo("ok     ", _summary(report))
        return
    from rich.text import Text

    screen = console()
    word, style = ("ok     ", "bold green") if report.ok else ("FAILED ", "bold red")
    failed = [difference for difference in report.drifted if difference.verdict != "dtype_only" or not report.ok]
    nothing_there = not report.verified and all(difference.verdict == "missing" for difference in failed)
    if report.drifted and not nothing_there:
        _show_differences(screen, report.drifted)
    # Below the table, which may be longer than the screen; what explains it and what to do next come after it.
    screen.print(Text(word, style=style).append(_summary(report), "default"), soft_wrap=True)

    def say(text: str, style: str = "") -> None:
        screen.print(Text(text, style=style), soft_wrap=not screen.is_terminal)

    for aside in asides:
        mild = "yellow" if aside.kind == "mismatched_trainable" else "dim"
        say(str(aside), "red" if aside.counts else mild)
    for code in sorted({difference.cause for difference in failed if difference.cause}):
        say(explained(code))
    for step in next_steps(report, failed):
        say(f"hint: {step}")
    if report.note:
        say(f"note: {report.note}")


def _summary(report: Report) -> str:
    return headline(report) + (f" ({voucher(report)})" if report.ok and not report.drifted else "")


def show_diff(report: DiffReport) -> None:
    if report.ok:
        _echo("identical")
        return
    from rich.text import Text

    screen = console()
    screen.print(
        Text(f"{counted(len(report.tensors))} {'differs' if len(report.tensors) == 1 else 'differ'}", style="bold red")
    )
    _show_differences(screen, report.tensors)


def _show_differences(screen: Console, differences: Sequence[Difference]) -> None:
    """A table; where it would not fit, a tensor's name and below it what there is to say."""
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    columns = [
        ("tensor", [shown(one.name) for one in differences[:ROWS]]),
        ("verdict", [one.verdict for one in differences[:ROWS]]),
    ]
    if any(one.cause for one in differences):
        columns.append(("cause", [one.cause or UNSETTLED for one in differences[:ROWS]]))
    if any(details := [one.describe_detail() for one in differences[:ROWS]]):
        columns.append(("detail", details))
    for heading, _ in columns:
        table.add_column(heading, no_wrap=True, overflow="fold")
    rows = list(zip(*(cells for _, cells in columns), strict=True))
    for row in rows:
        table.add_row(*row)
    if len(differences) > ROWS:
        table.add_row(f"... and {len(differences) - ROWS:,} more; --json lists all")
    if fits(screen, table):
        screen.print(table)
        return
    for name, *rest in rows:
        screen.print(name, soft_wrap=True)
        screen.print(f"  {'  '.join(part for part in rest if part)}", soft_wrap=True)
    if len(differences) > ROWS:
        screen.print(f"... and {len(differences) - ROWS:,} more; --json lists all")
