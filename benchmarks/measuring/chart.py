"""The results as a chart: ratios as bars beside the line at 1.0, and seconds per GB as checkpoints grow."""

from __future__ import annotations

import math
from xml.sax.saxutils import escape

from .results import Measured, Results, Spread

_STYLE = """\
text { font: 12px system-ui, sans-serif; fill: #1f2328 }
.title { font-size: 14px; font-weight: 600 } .soft { fill: #59636e } .figure { text-anchor: end }
.ground { fill: #ffffff } .bar { fill: #afb8c1 } .own { fill: #0969da }
.spread, .growth { stroke: #1f2328; fill: none } .one { stroke: #cf222e; stroke-dasharray: 2 3 } .dot { fill: #1f2328 }
@media (prefers-color-scheme: dark) {
text { fill: #e6edf3 } .soft { fill: #9198a1 } .ground { fill: #0d1117 } .bar { fill: #656c76 } .own { fill: #4493f8 }
.spread, .growth { stroke: #e6edf3 } .one { stroke: #f85149 } .dot { fill: #e6edf3 }
}"""

_ROW, _BAR = 22, 12  # heights
_LABELS, _BARS, _BARS_END, _RATIO, _GROWTH, _FIGURES, _COLUMN = 16, 280, 540, 590, 640, 730, 60
_STEP = 40  # of a growth line, from size to size


def svg(results: Results) -> str:
    """A whole document. It brings its own ground, since a page may be dark where a system is light."""
    width = _FIGURES + _COLUMN * len(results.sizes())
    body: list[str] = []
    y = 12
    for place in results.places:
        drawn, y = _place(results, place, y)
        body += drawn
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {y}" width="{width}" height="{y}">',
            f"<style>\n{_STYLE}\n</style>",
            f'<rect class="ground" width="{width}" height="{y}"/>',
            *body,
            "</svg>\n",
        ]
    )


def _place(results: Results, place: str, y: int) -> tuple[list[str], int]:
    """The rows of one file system, from there on down; and where they end."""
    sizes = results.sizes(place)
    tools = results.measured(place)
    found = [(tool, results.ratio(place, sizes[-1], tool)) for tool in tools]
    longest = max([1.0, *(ratio.most for _, ratio in found if ratio)])
    scale = (_BARS_END - _BARS) / longest
    y += 2 * _ROW
    drawn = [
        _text(_LABELS, y - _ROW, f"{place}: time at {sizes[-1]:g} GB, the yardstick's is 1", "title"),
        _text(_GROWTH, y - _ROW, "seconds per GB", "title"),
        *(_text(_column(i), y, f"{size:g} GB", "soft figure") for i, size in enumerate(sizes)),
    ]
    for tool, ratio in found:
        y += _ROW
        if tool.yardstick is None:
            drawn.append(_text(_LABELS, y, f"{tool.name} = 1", "soft"))
        else:
            drawn.append(_text(_LABELS, y, tool.name))
        if ratio:
            drawn += _bar(tool, ratio, scale, y)
        drawn += _growth(results, place, sizes, tool, y)
    return drawn, y + 12


def _bar(tool: Measured, ratio: Spread, scale: float, y: int) -> list[str]:
    """A ratio's median, with a line from its smallest to its largest, and a stroke of the line at 1.0."""
    kind = "own" if tool.name.startswith("ckptsurg") else "bar"
    said = f"{tool.name}: {ratio.median:.2f} ({ratio.least:.2f}-{ratio.most:.2f})"
    median, least, most = ratio.median * scale, _BARS + ratio.least * scale, _BARS + ratio.most * scale
    return [
        f'<rect class="{kind}" x="{_BARS}" y="{y - _BAR + 2}" width="{median:.1f}" height="{_BAR}">'
        f"<title>{escape(said)}</title></rect>",
        f'<path class="spread" d="M{least:.1f} {y - 4}H{most:.1f}"/>',
        f'<path class="one" d="M{_BARS + scale:.1f} {y - _ROW + 6}v{_ROW}"/>',
        _text(_RATIO, y, f"{ratio.median:.2f}", "figure"),
    ]


def _growth(results: Results, place: str, sizes: list[float], tool: Measured, y: int) -> list[str]:
    """Seconds per GB: figures, and a line that is level where cost grows linearly; a row's height is a factor of 4."""
    found = [(i, results.seconds(place, size, tool.name)) for i, size in enumerate(sizes)]
    figures = [(i, seconds.median / sizes[i]) for i, seconds in found if seconds]
    drawn = [_text(_column(i), y, f"{each:.2f}", "figure") for i, each in figures]
    if not figures:
        return drawn
    middle = math.log(figures[-1][1])
    up = _ROW / math.log(4)
    step = min(_STEP, (_FIGURES - _GROWTH - 30) / max(1, len(sizes) - 1))
    points = []
    for i, each in figures:
        rise = max(-_ROW / 2, min(_ROW / 2, up * (math.log(each) - middle)))
        points.append((_GROWTH + i * step, y - 4 - rise))
    path = " ".join(f"{x:.1f},{height:.1f}" for x, height in points)
    drawn.append(f'<polyline class="growth" points="{path}"/>')
    return drawn + [f'<circle class="dot" cx="{x:.1f}" cy="{height:.1f}" r="2"/>' for x, height in points]


def _column(number: int) -> int:
    return _FIGURES + _COLUMN * number + _COLUMN - 16


def _text(x: int, y: int, text: str, kind: str = "") -> str:
    styled = f' class="{kind}"' if kind else ""
    return f'<text x="{x}" y="{y}"{styled}>{escape(text)}</text>'
