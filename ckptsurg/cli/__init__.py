"""The command line: arguments in, one call of the library, rendering out."""

from __future__ import annotations

import gc
import signal
import sys
from typing import NoReturn

import click

from ..errors import CkptsurgError

__all__ = ["main"]

_INTERRUPTED = 130
_SYSTEM_FAILED = 4


def main() -> NoReturn:
    """Run the command line and exit."""
    signal.signal(signal.SIGTERM, _terminate)
    signal.signal(signal.SIGHUP, _terminate)
    # A command ends soon, and what it builds (100,000 tensors' headers) has no cycles worth a search.
    gc.disable()
    sys.exit(_run())


def _terminate(number: int, _: object) -> NoReturn:
    # As an exception, so that whatever is staged is taken away.
    sys.exit(128 + number)


def _run() -> int:
    """The one place where errors become messages and exit codes."""
    from .commands import cli

    try:
        code = cli.main(prog_name="ckptsurg", standalone_mode=False)
        sys.stdout.flush()
    except CkptsurgError as error:
        return _complain(str(error), error.hint, error.exit_code)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (KeyboardInterrupt, click.Abort):
        click.echo("interrupted", err=True)
        return _INTERRUPTED
    except BrokenPipeError:
        sys.stderr.close()  # the reader has gone; nobody is left to complain to
        return _SYSTEM_FAILED
    except OSError as error:
        place = f" ({error.filename})" if error.filename else ""
        return _complain(f"{error.strerror or error}{place}", None, _SYSTEM_FAILED)
    except MemoryError:
        return _complain("out of memory", None, _SYSTEM_FAILED)
    return code if isinstance(code, int) else 0


def _complain(message: str, hint: str | None, code: int) -> int:
    click.echo(f"{click.style('error:', fg='red', bold=True)} {message}", err=True)
    if hint:
        click.echo(f"{click.style('hint:', fg='cyan')} {hint}", err=True)
    return code
