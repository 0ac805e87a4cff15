"""The command line: arguments in, one call of the library, rendering out."""

from __future__ import annotations

import gc
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

import click

from ..errors import CkptsurgError
from ..wording import shown

__all__ = ["SIGNALS", "main"]

#: Those that stop a command.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_INTERRUPTED = 130
_SYSTEM_FAILED = 4
#: Names the variable by which whoever looks for a bug sees where it is.
_TRACEBACK = "CKPTSURG_TRACEBACK"


def main() -> NoReturn:
    """Run the command line and exit."""
    # A stream that the caller closed is None, and the next file opened would take its number.
    sys.stdout = sys.stdout or Path(os.devnull).open("w")  # noqa: SIM115 - open to the end
    sys.stderr = sys.stderr or Path(os.devnull).open("w")  # noqa: SIM115 - likewise
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
            signal.signal(number, _stop)
    # With a thread for each core numpy takes twice as long to import.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    # A command ends soon, and what it builds (100,000 tensors' headers) has no cycles worth a search.
    gc.disable()
    code = _run()
    _ignore_signals()  # nothing is left to be done but to leave
    # Nor is there any in the last search that the interpreter makes, which takes longer than many a command.
    gc.freeze()
    sys.exit(code)


def _stop(number: int, _: object) -> NoReturn:
    """As an exception, so that whatever is staged is taken away; which is then not interrupted by another."""
    _ignore_signals()
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    sys.exit(128 + number)


def _ignore_signals() -> None:
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _run() -> int:
    """The one place where errors become messages and exit codes."""
    from .commands import ReaderGone, cli

    try:
        code = cli.main(prog_name="ckptsurg", standalone_mode=False)
        sys.stdout.flush()
    except CkptsurgError as error:
        return _complain(error.message, error.hint, error.exit_code)
    except click.ClickException as error:
        with suppress(OSError):
            error.show()
        return error.exit_code
    except (KeyboardInterrupt, click.Abort):
        click.echo("interrupted", err=True)
        return _INTERRUPTED
    except (ReaderGone, BrokenPipeError):
        # Nobody is left to complain to, and the interpreter must not try to flush on its way out.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _SYSTEM_FAILED
    except OSError as error:
        place = f" ({error.filename})" if error.filename else ""
        return _complain(f"{error.strerror or error}{place}", None, _SYSTEM_FAILED)
    except MemoryError:
        return _complain("out of memory", None, _SYSTEM_FAILED)
    except (SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # a library in Rust that panics raises no Exception
        if os.environ.get(_TRACEBACK):
            sys.excepthook(*sys.exc_info())
        hint = f"this is not your fault; please report it, with what {_TRACEBACK}=1 prints"
        return _complain(f"unforeseen {type(error).__name__}: {shown(error)}", hint, _SYSTEM_FAILED)
    return code if isinstance(code, int) else 0


def _complain(message: str, hint: str | None, code: int) -> int:
    colour = False if os.environ.get("NO_COLOR") else None
    with suppress(OSError):  # where the message cannot be written, the code must still be right
        click.echo(f"{click.style('error:', fg='red', bold=True)} {message}", err=True, color=colour)
        if hint:
            click.echo(f"{click.style('hint:', fg='cyan')} {hint}", err=True, color=colour)
    return code
