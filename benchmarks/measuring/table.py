"""The results as text: one table in Markdown, for docs/performance.md, and one of every figure, for the terminal."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from .results import Measured, Missing, Results, Spread

BEGIN, END = "<!-- bench -->", "<!-- /bench -->"
_LEAST_SEEN = 30e6  # bytes of memory: of less, the measuring process's own is all that can be seen


def markdown(results: Results) -> str:
    """Medians of ratios with their smallest and largest; of a yardstick the seconds, which are its 1.0."""
    sizes, shares = results.sizes(), bool(results.shared)
    head = ["file system", "", *(f"{size:g} GB" for size in sizes), "s per GB", "memory", *(["shared"] * shares)]
    rows = [head, ["---"] * len(head)]
    for place in results.places:
        largest = results.sizes(place)[-1]
        for tool in results.measured(place):
            memory = results.memory(place, largest, tool.name)
            rows.append(
                [
                    place,
                    f"**{tool.name}**" if tool.yardstick is None else tool.name,
                    *(_cell(results, place, size, tool) for size in sizes),
                    ", ".join(_per_gb(results, place, size, tool.name) for size in results.sizes(place)),
                    f"{memory / 1e6:.0f} MB" if memory and memory > _LEAST_SEEN else "",
                    *([_share(results, place, largest, tool.name)] * shares),
                ]
            )
    table = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    return "\n\n".join([table, _how(results), *_missing(results)])


def _cell(results: Results, place: str, size: float, tool: Measured) -> str:
    if tool.yardstick is None:
        seconds = results.seconds(place, size, tool.name)
        return f"{seconds.median:.2f} s" if seconds else ""
    ratio = results.ratio(place, size, tool)
    return f"{ratio.median:.2f} ({ratio.least:.2f}-{ratio.most:.2f})" if ratio else ""


def _per_gb(results: Results, place: str, size: float, tool: str) -> str:
    seconds = results.seconds(place, size, tool)
    return f"{seconds.median / size:.2f}" if seconds else "-"


def _share(results: Results, place: str, size: float, tool: str) -> str:
    found = [one for one in results.shared if (one.place, one.gigabytes, one.tool) == (place, size, tool)]
    return f"{found[-1].shared / 1e9:.3f} of {found[-1].bytes / 1e9:.3f} GB" if found else ""


def _how(results: Results) -> str:
    has, uses = results.machine, results.versions
    counts = {max(run.round for run in results.runs if run.place == place) for place in results.places}
    rounds = " to ".join(str(count) for count in sorted(counts))
    return (
        f"Medians of {rounds} rounds, with the smallest and largest: whole processes, over the time that the yardstick "
        "above them (in bold) took just before, with the base in the page cache. What `cp` copies has the bytes that a "
        "rewrite writes. Seconds per GB of the base are by size; memory and shared extents of the largest size. Only "
        "ckptsurg, and `cp` where it says so, wait for the disk.\n"
        f"{has['cores']} cores of {has['processor']}, {has['memory']}, {has['kernel']}; "
        + ", ".join(f"{name} {number}" for name, number in uses.items())
        + "."
    )


def _missing(results: Results) -> Iterator[str]:
    # A reason is said once, of whatever sizes and places.
    places: dict[tuple[str, str], list[str]] = {}
    for one in results.missing:
        places.setdefault((one.name, one.reason), []).append(one.place)
    if places:
        yield "Not measured:\n" + "\n".join(
            f"- {name} on {', '.join(dict.fromkeys(where))}: {reason}" for (name, reason), where in places.items()
        )


def missing_line(one: Missing) -> str:
    return f"not measured: {one.name} on {one.place}: {one.reason}"


def terminal(results: Results, place: str, size: float) -> str:
    """Seconds, ratio (median, smallest, largest each) and largest resident memory of one place and size."""
    lines = [f"{place}, {size:g} GB", f"  {'':42}{'seconds':^24}{'ratio':^24}{'memory':>9}"]
    for tool in results.measured(place):
        seconds, ratio = results.seconds(place, size, tool.name), results.ratio(place, size, tool)
        if seconds:
            memory = (results.memory(place, size, tool.name) or 0) / 1e6
            lines.append(f"  {tool.name:42}{_three(seconds)}{_three(ratio)}{memory:6.0f} MB")
    return "\n".join(lines)


def _three(spread: Spread | None) -> str:
    return f"{spread.median:8.3f}{spread.least:8.3f}{spread.most:8.3f}" if spread else " " * 24


def put(text: str, readme: Path) -> bool:
    """Replace what stands between the marks; False where there are none, and nothing is written."""
    if not readme.exists():
        return False
    before, begun, rest = readme.read_text().partition(BEGIN)
    _, ended, after = rest.partition(END)
    if not (begun and ended):
        return False
    readme.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}")
    return True
