"""``ckptsurg check``: are specs valid, as far as that can be said without a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import click

__all__ = ["check"]


@click.command()
@click.argument("specs", metavar="SPEC...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print the problems alone, on standard output.")
def check(specs: tuple[Path, ...], as_json: bool) -> int:
    """Check specs without a checkpoint. Whether patterns match anything, plan says.

    Exit codes: 0 every spec is valid; 2 one is not, or is not there; 4 the system failed.
    """
    from ..errors import SpecError, UsageError
    from ..planning import checking
    from ..wording import counted, shown

    found: list[dict[str, object]] = []
    messages: list[str] = []
    for path in specs:
        problems: list[dict[str, object]] = []
        try:
            checking.check(path)
        except SpecError as error:
            problems += [{"path": one.path, "line": one.line, "message": one.message} for one in error.problems]
            messages.append(error.message)
        except UsageError as error:
            problems.append({"path": "", "line": None, "message": error.message})
            messages.append(error.message)
        found.append({"spec": shown(path), "problems": problems})
    if as_json:
        click.echo(json.dumps({"version": 1, "ok": not messages, "specs": found}, indent=1))
    if messages:
        raise UsageError("\n".join(messages), hint="`ckptsurg schema spec` prints the schema")
    if not as_json:
        click.echo(f"{counted(len(specs), 'spec')} valid")
    return 0
