"""How fast ckptsurg is beside `cp`, bare BLAKE3, `cmp` and its peers, at several sizes and on several file systems.

    python benchmarks/speed.py [--sizes 0.25,1,4] [--rounds 7] [--where ext4,xfs] [--folder build/bench]

`make bench` installs the peers and runs it. For each size and file system it makes a Llama-shaped bf16 checkpoint of
random bytes, and runs every tool once a round, in an order by chance, each a whole process and each just after its
yardstick; before each the earlier output is removed, `sync`, and a few GB of memory touched and released. The first
round does not count. A ratio is a tool's time over that of the yardstick just before it. The file system of the
folder is used as it is; others live in a sparse image, which needs root and mkfs, and which is unmounted and removed
at the end, on Ctrl-C too. What cannot be measured is named.

Written are docs/performance.json (every run), docs/performance.svg, and the table between `<!-- bench -->` and
`<!-- /bench -->` in docs/performance.md. `--from docs/performance.json` makes the latter two again without measuring.
Memory is the largest resident set of a tool's process and those that it waited for; what this process has, some 26 MB,
is the least that can be seen. A GB of checkpoint takes 5 GB of disk, and of memory, if nothing is to be read from disk.
"""

from __future__ import annotations

import argparse
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from measuring import chart, places, results, running, table, tools


def main() -> None:
    options = _options()
    if options.kept:
        found = results.Results.load(options.kept)
    else:
        # As an exception, so that images are unmounted.
        signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
        found = measure(options)
    if not found.runs:
        sys.exit("nothing was measured")
    report(found, options.docs, options.readme)


def _options() -> argparse.Namespace:
    said = __doc__ or ""
    parser = argparse.ArgumentParser(description=said, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=_numbers, default=[0.25, 1.0, 4.0], help="GB (10^9 bytes); default 0.25,1,4")
    parser.add_argument("--rounds", type=int, default=7, help="that count; default 7")
    parser.add_argument("--where", type=_words, help="file systems; default: that of the folder, and xfs")
    parser.add_argument(
        "--tools", type=_words, default=[""], help="measure those with one of these words in their name"
    )
    parser.add_argument("--folder", type=Path, default=Path("build/bench"), help="default build/bench")
    parser.add_argument("--docs", type=Path, default=Path("docs"), help="for chart and runs; default docs")
    page = Path("docs/performance.md")
    parser.add_argument("--readme", type=Path, default=page, help=f"for the table; default {page}")
    parser.add_argument("--from", dest="kept", type=Path, metavar="JSON", help="of an earlier run")
    options = parser.parse_args()
    if options.rounds < 1:
        parser.error("--rounds: at least one")
    return options


def _words(text: str) -> list[str]:
    return text.split(",")


def _numbers(text: str) -> list[float]:
    return [float(word) for word in text.split(",")]


def measure(options: argparse.Namespace) -> results.Results:
    """Everything, one file system and size after the other, in a folder that is taken away again."""
    known = [*tools.rewriting(options.folder, reflinks=True), *tools.verifying(options.folder)]
    names = [results.Measured(tool.name, tool.yardstick) for tool in known]
    found = results.Results(results.machine(), results.versions(), names)
    options.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.folder.resolve(), prefix="speed-") as kept:
        folder = Path(kept)
        for name in options.where or list(dict.fromkeys([places.own_file_system(folder), "xfs"])):
            for size in options.sizes:
                try:
                    with places.place(name, folder, size) as place:
                        _measure_place(found, place, size, options)
                except places.NotHere as reason:
                    _miss(found, results.Missing("everything", name, str(reason).replace(kept, "")))
                    break
    return found


def _measure_place(found: results.Results, place: places.Place, size: float, options: argparse.Namespace) -> None:
    print(f"{place.name}, {size:g} GB: making the checkpoint", flush=True)
    tools.prepare(place.folder, size)
    # Proofs read what is in memory, whatever the file system: once is enough.
    proofs = not found.runs or place.name == found.runs[0].place
    _measure_group(found, place, size, tools.rewriting(place.folder, reflinks=place.reflinks), options)
    if proofs:
        tools.prepare_proofs(place.folder)
        _measure_group(found, place, size, tools.verifying(place.folder), options)
    print(table.terminal(found, place.name, size), flush=True)


def _measure_group(
    found: results.Results, place: places.Place, size: float, group: list[tools.Tool], options: argparse.Namespace
) -> None:
    wanted = {tool.name for tool in group if any(word in tool.name for word in options.tools)}
    yardsticks = {tool.yardstick for tool in group if tool.name in wanted}
    present = []
    for tool in group:
        if tool.name in wanted | yardsticks:
            if reason := tools.absence(tool):
                _miss(found, results.Missing(tool.name, place.name, reason))
            else:
                present.append(tool)
    out = place.folder / "out"
    touched = running.memory_to_touch(size)
    for outcome in running.rounds(present, options.rounds, out, touched):
        tool, found_now = outcome.tool, outcome.timed
        if isinstance(found_now, running.Failed):
            reason = str(found_now).replace(str(place.folder), "")
            _miss(found, results.Missing(tool.name, place.name, reason))
            continue
        if outcome.round:
            seconds, beside = round(found_now.seconds, 4), outcome.beside and round(outcome.beside, 4)
            print(f"  round {outcome.round}  {seconds:8.3f} s  {tool.name}", flush=True)
            run = results.Run(place.name, size, tool.name, outcome.round, seconds, beside, found_now.memory)
            found.runs.append(run)
        if outcome.round == options.rounds and place.reflinks and out.exists() and shutil.which("filefrag"):
            shared = results.Shared(place.name, size, tool.name, *places.shared_bytes(out))
            found.shared = [one for one in found.shared if (one.place, one.gigabytes, one.tool) != shared.whose]
            found.shared.append(shared)


def _miss(found: results.Results, missing: results.Missing) -> None:
    if missing not in found.missing:
        found.missing.append(missing)
        print(table.missing_line(missing), flush=True)


def report(found: results.Results, docs: Path, readme: Path) -> None:
    """Write chart, runs and table."""
    docs.mkdir(parents=True, exist_ok=True)
    found.save(docs / "performance.json")
    (docs / "performance.svg").write_text(chart.svg(found))
    text = table.markdown(found)
    if table.put(text, readme):
        print(f"{readme}: the table is in its place")
    else:
        print(f"{readme} has no place for the table ({table.BEGIN} and {table.END}):\n\n{text}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except subprocess.CalledProcessError as error:
        sys.exit(f"{Path(error.cmd[0]).name} failed with exit code {error.returncode}\n{error.stderr or ''}".rstrip())
