"""How a plan looks on a terminal."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..patterns import unlike_parts
from ..wording import counted, shown, size
from .rendering import ROWS, console, elements, fits

if TYPE_CHECKING:
    from rich.console import Console

    from ..dealing import Deal
    from ..planning.explaining import Explanation
    from ..plans import Plan, PlannedTensor
    from ..spec import Spec

__all__ = ["show_deal", "show_explanation", "show_plan"]

_DOES = {"takes": "takes it", "gives away": "gives it away", "filters out": "filters it out"}
#: Of tensors that are named one by one.
_SOME = 8

_FATES = {
    ("copy", True): ("frozen", "cyan"),
    ("copy", False): ("trains", "green"),
    ("drop", False): ("dropped", "red"),
    ("reinit", False): ("drawn, trains", "yellow"),
    ("reinit", True): ("drawn, frozen", "yellow"),
    ("add", False): ("added, trains", "magenta"),
    ("add", True): ("added, frozen", "magenta"),
    ("cast", True): ("cast, frozen", "blue"),
    ("cast", False): ("cast, trains", "blue"),
    ("graft", True): ("grafted, frozen", "blue"),
    ("graft", False): ("grafted, trains", "blue"),
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
                _example(tensors),
            )
        )
    screen = console()
    headings = ("fate", "rule", "pattern", "tensors", "elements", "size", "for example")
    for columns in (headings, headings[:-1]):  # where there is little room, counts come before examples
        table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
        for heading in columns:
            numbers = heading in ("tensors", "elements", "size")
            table.add_column(heading, justify="right" if numbers else "left", no_wrap=heading != "pattern")
        for row in rows:
            table.add_row(*row[: len(columns)])
        if fits(screen, table):
            break
    screen.print(table)
    output = plan.output
    drawn = [tensor for tensor in output if tensor.init is not None]
    with_rows = [tensor for tensor in output if tensor.rows is not None]
    if drawn or with_rows:
        screen.print()
    for tensor in drawn[:ROWS]:
        line = Text(f"{shown(tensor.name)}  ")
        if tensor.old_shape not in (None, tensor.shape):
            line.append(f"{list(tensor.old_shape or ())} -> ", style="dim")
        line.append(f"{tensor.info}", style="cyan").append(f"  {_initializer(tensor)}")
        screen.print(line, soft_wrap=True)
    if len(drawn) > ROWS:
        screen.print(f"... and {len(drawn) - ROWS:,} more; --json lists all")
    for tensor in with_rows[:ROWS]:
        assert tensor.rows is not None
        screen.print(
            f"{shown(tensor.name)}  rows {tensor.rows[0]:,} to {tensor.rows[1] - 1:,} are frozen, the rest trains"
        )
    _show_sources(screen, output)
    for path, value in (spec.config.set if spec.config else {}).items():
        screen.print(f"config.json  {shown(path)} = {shown(json.dumps(value), 100)}", soft_wrap=True)
    for path in spec.config.unset if spec.config else ():
        screen.print(f"config.json  {shown(path)} goes", soft_wrap=True)
    screen.print()
    partly = len(with_rows)
    said = f"{plan.counts['frozen'] - partly:,} frozen" + (f", {partly:,} in part" if partly else "")
    screen.print(f"output: {counted(len(output))}, {size(total)}; {said}, {plan.counts['trainable']:,} trainable")
    for note in plan.notes:
        screen.print(Text("note: ", style="yellow").append(note, style="default"), soft_wrap=True)


def _show_sources(screen: Console, output: Sequence[PlannedTensor]) -> None:
    """Which tensors are another checkpoint's, cast, or called otherwise; some of each."""
    lines = {
        "grafted": [f"{shown(one.name)}  of {shown(one.donor)}" for one in output if one.donor is not None],
        "cast": [f"{shown(one.name)}  {one.old_dtype} -> {one.dtype}" for one in output if one.old_dtype is not None],
        "renamed": [
            f"{shown(old)} -> {shown(new)}"
            for old, new in dict.fromkeys(unlike_parts(one.name, one.to) for one in output if one.to is not None)
        ],
    }
    for what, found in lines.items():
        for line in found[:_SOME]:
            screen.print(f"{what}  {line}", soft_wrap=True)
        if len(found) > _SOME:
            screen.print(f"{what}  ... and {len(found) - _SOME:,} more; --json lists all")


def _example(tensors: Sequence[PlannedTensor]) -> str:
    """The largest of them: its name, or where that changes, both in short."""
    largest = max(tensors, key=lambda tensor: tensor.info.nbytes)
    if largest.to is None:
        return shown(largest.name, 60)
    old, new = unlike_parts(largest.name, largest.to)
    rest = "..." if old != largest.name else ""
    return f"{shown(old, 60)}{rest} -> {shown(new, 60)}{rest}"


def show_deal(deal: Deal) -> None:
    """How the work would be dealt out, in a line."""
    most = max(deal.loads)
    line = f"{counted(len(deal.loads), 'rank')}: {size(most)} each at most, read and written, {deal.unevenness:.3f} of"
    files = counted(max(map(len, deal.shares)), "file")
    console().print(f"{line} the mean; a part of {files} at most", soft_wrap=True)


def show_explanation(explanation: Explanation) -> None:
    from rich.text import Text

    screen, tensor = console(), explanation.tensor
    fate, style = _FATES[tensor.action, tensor.frozen]
    name = shown(tensor.name) if tensor.to is None else f"{shown(tensor.name)} -> {shown(tensor.to)}"
    line = Text(f"{name}  ").append(str(tensor.info), style="cyan").append(f"  {fate}", style=style)
    screen.print(line, soft_wrap=True)
    for reason in explanation.reasons:
        mark = Text("  * " if reason.decides else "    ", style="bold")
        screen.print(mark.append(f"{reason.rule}  {shown(reason.pattern)}  {_DOES[reason.does]}"), soft_wrap=True)
    if not explanation.reasons:
        screen.print("    no pattern of the spec matches it", soft_wrap=True)
    if any(not reason.decides for reason in explanation.reasons):
        screen.print("  * is what counts: in a list the last one does", style="dim")
    if explanation.also is not None:
        screen.print(f"\nwhat is called {shown(tensor.name)} in the output is another tensor:", soft_wrap=True)
        show_explanation(explanation.also)


def _initializer(tensor: PlannedTensor) -> str:
    """``normal(mean=0, std=0.02)``, with what is kept."""
    assert tensor.init is not None
    arguments = ", ".join(
        f"{key}={value:.6g}" if isinstance(value, float) else f"{key}={value}"
        for key, value in tensor.init.arguments.items()
    )
    return f"{tensor.init.name}({arguments})" + (", what overlaps is kept" if tensor.keep else "")
