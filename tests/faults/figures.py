"""How many points a run of the fault suite went through, by what its report says.

python -m tests.faults.figures build/faults.xml
"""

from __future__ import annotations

import sys
from collections import Counter
from xml.etree import ElementTree


def main(report: str) -> None:
    found: Counter[str] = Counter()
    for case in ElementTree.parse(report).iter("testcase"):
        name = case.get("name", "").partition("[")[0].removeprefix("test_").replace("_", " ")
        for one in case.iter("property"):
            found[f"{name}: {one.get('name')}"] += int(one.get("value", "0"))
        found["tests that fail"] += any(True for kind in ("failure", "error") for _ in case.iter(kind))
    for name, number in found.items():
        print(f"{number:8,} {name}")  # noqa: T201 - it is what the command is for


if __name__ == "__main__":
    main(sys.argv[1])
