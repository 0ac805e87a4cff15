"""What was measured: every single run, and the figures made of them."""

from __future__ import annotations

import json
import os
import platform
import re
import statistics
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from .tools import version

_PACKAGES = ["ckptsurg", "blake3", "safetensors", "mergekit", "transformers", "torch"]


@dataclass(frozen=True)
class Measured:
    """A tool, and the name of its yardstick; none: it is one itself."""

    name: str
    yardstick: str | None


@dataclass(frozen=True)
class Run:
    place: str
    gigabytes: float  # of the checkpoint, 10^9 bytes
    tool: str
    round: int  # from 1
    seconds: float
    beside: float | None  # seconds of the yardstick just before; none: it is one itself
    memory: int  # bytes


@dataclass(frozen=True)
class Missing:
    """A tool or place that is not measured, by name and reason. No gigabytes: of any size."""

    name: str
    place: str
    reason: str


@dataclass(frozen=True)
class Shared:
    """Of an output, how much lies in extents that another file has too. Bytes."""

    place: str
    gigabytes: float
    tool: str
    bytes: int
    shared: int

    @property
    def whose(self) -> tuple[str, float, str]:
        return self.place, self.gigabytes, self.tool


@dataclass(frozen=True)
class Spread:
    median: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        found = sorted(values)
        return cls(statistics.median(found), found[0], found[-1])


@dataclass
class Results:
    machine: dict[str, str]
    versions: dict[str, str]
    tools: list[Measured] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)
    shared: list[Shared] = field(default_factory=list)
    missing: list[Missing] = field(default_factory=list)

    @property
    def places(self) -> list[str]:
        return list(dict.fromkeys(run.place for run in self.runs))

    def sizes(self, place: str | None = None) -> list[float]:
        return sorted({run.gigabytes for run in self.runs if place in (None, run.place)})

    def measured(self, place: str) -> list[Measured]:
        """The tools that ran there, each yardstick before what is held against it; without one nothing is said."""
        ran = {run.tool for run in self.runs if run.place == place}
        found = [tool for tool in self.tools if {tool.name, tool.yardstick or tool.name} <= ran]
        order = [tool.name for tool in found if tool.yardstick is None]
        return sorted(found, key=lambda tool: (order.index(tool.yardstick or tool.name), tool.yardstick is not None))

    def of(self, place: str, gigabytes: float, tool: str) -> list[Run]:
        """Its runs; empty where there are none."""
        asked = (place, gigabytes, tool)
        return [run for run in self.runs if (run.place, run.gigabytes, run.tool) == asked]

    def seconds(self, place: str, gigabytes: float, tool: str) -> Spread | None:
        found = self.of(place, gigabytes, tool)
        return Spread.of(run.seconds for run in found) if found else None

    def ratio(self, place: str, gigabytes: float, tool: Measured) -> Spread | None:
        """Its seconds over those of its yardstick, pair by pair."""
        pairs = [run.seconds / run.beside for run in self.of(place, gigabytes, tool.name) if run.beside]
        return Spread.of(pairs) if pairs else None

    def memory(self, place: str, gigabytes: float, tool: str) -> int | None:
        """The largest of all runs, in bytes."""
        return max((run.memory for run in self.of(place, gigabytes, tool)), default=None)

    def save(self, path: Path) -> None:
        """As JSON, a run a line."""
        parts = []
        for key, value in asdict(self).items():
            lines = ",\n".join(f"  {json.dumps(one)}" for one in value) if isinstance(value, list) else ""
            parts.append(f" {json.dumps(key)}: " + (f"[\n{lines}\n ]" if lines else json.dumps(value)))
        path.write_text("{\n" + ",\n".join(parts) + "\n}\n")

    @classmethod
    def load(cls, path: Path) -> Results:
        kept = json.loads(path.read_text())
        kinds = {"tools": Measured, "runs": Run, "shared": Shared, "missing": Missing}
        lists = {key: [kind(**one) for one in kept[key]] for key, kind in kinds.items()}
        return cls(kept["machine"], kept["versions"], **lists)


def machine() -> dict[str, str]:
    """In words that name no host."""
    model = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "processor": model[1].strip() if model else platform.machine(),
        "cores": str(len(os.sched_getaffinity(0))),
        "memory": f"{memory / 1e9:.0f} GB",
        "kernel": " ".join([platform.system(), *re.findall(r"^\d+\.\d+", platform.release())]),
    }


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    return found | {name: number for name in _PACKAGES if (number := version(name)) is not None}
