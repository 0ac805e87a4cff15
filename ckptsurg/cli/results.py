"""Where a pipeline finds what a verify came to: files of JUnit and Markdown, written whatever comes of it."""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import CkptsurgError, UsageError, system_failures
from ..wording import shown

if TYPE_CHECKING:
    from ..manifest import Manifest
    from ..report import Report

__all__ = ["results"]

_log = logging.getLogger("ckptsurg")

#: Names the file to which a step of GitHub Actions appends its summary.
_STEP_SUMMARY = "GITHUB_STEP_SUMMARY"


@contextmanager
def results(junit: Path | None, markdown: Path | None, checkpoint: Path) -> Iterator[Callable[..., None]]:
    """Where what a verify came to goes; if it came to nothing, the files say why.

    An earlier JUnit file of ours is taken away at once: if this run is killed, nothing says that all is well.

    Args:
        junit: The file of JUnit XML, made anew.
        markdown: The file of Markdown, appended to, as the summaries of a pipeline's steps are.
        checkpoint: What is verified, as the user called it.

    Yields:
        What publishes it, given the report, the manifest and its path, and what else an ``Outcome`` holds. It raises
        SystemFailure if the system fails.

    Raises:
        UsageError: if a place is taken by something else.
    """
    if junit is not None and markdown is not None and os.path.abspath(junit) == os.path.abspath(markdown):  # noqa: PTH100
        raise UsageError(f"{shown(junit)}: is given for both JUnit and Markdown")
    if markdown is not None:
        _refuse_unless_markdown(markdown)
    if junit is not None:
        _withdraw(junit)
    is_published = junit is None and markdown is None

    def publish(report: Report, manifest: Manifest, manifest_path: Path, **asked: bool) -> None:
        nonlocal is_published
        if is_published:
            return
        is_published = True
        from ..summaries import junit as as_junit
        from ..summaries import markdown as as_markdown
        from ..summaries.outcomes import Outcome

        outcome = Outcome(report, manifest, shown(checkpoint), shown(manifest_path), **asked)
        if junit is not None:
            _publish(junit, as_junit.render(outcome))
        if markdown is not None:
            _append(markdown, as_markdown.render(outcome))

    try:
        yield publish
    except BaseException as failure:  # an interrupted run has no outcome either
        if not is_published:
            _say_why(junit, markdown, checkpoint, failure)
        raise


def _say_why(junit: Path | None, markdown: Path | None, checkpoint: Path, failure: BaseException) -> None:
    from ..summaries import junit as as_junit
    from ..summaries import markdown as as_markdown

    label = shown(checkpoint)
    if isinstance(failure, CkptsurgError):
        message = f"{failure.message}\nhint: {failure.hint}" if failure.hint else failure.message
    else:
        known = isinstance(failure, KeyboardInterrupt | SystemExit)
        message = "interrupted" if known else f"unforeseen {type(failure).__name__}: {shown(failure)}"
    try:
        if junit is not None:
            _publish(junit, as_junit.not_verified(label, message))
        if markdown is not None:
            _append(markdown, as_markdown.not_verified(label, message))
    except (CkptsurgError, OSError) as second:
        _log.warning("%s", second)  # beside the first, which is what is told


def _withdraw(path: Path) -> None:
    """Take an earlier file of JUnit away.

    Raises:
        UsageError: if what is there is none of ours.
    """
    from .. import disk
    from ..summaries.junit import is_ours

    with system_failures(shown(path)):
        if not os.path.lexists(path):
            return
        is_one = stat.S_ISREG(path.lstat().st_mode)
        if is_one:
            with path.open("rb") as file:
                is_one = is_ours(file.read(1000))
        if not is_one:
            raise UsageError(f"{shown(path)}: is no JUnit file of ckptsurg and is not replaced; choose another place")
        disk.remove(path)


def _publish(path: Path, content: bytes) -> None:
    from ..publishing import publish_document

    publish_document(content, path, overwrite=False)


def _refuse_unless_markdown(path: Path) -> None:
    """Refuse to append to a file that by its name is no Markdown: a manifest would be spoilt.

    Raises:
        UsageError: if it is none.
    """
    label = shown(path)
    with system_failures(label):
        if not path.exists():
            return
        if not path.is_file():
            raise UsageError(f"{label}: is no file; Markdown is appended to a file")
        step = os.environ.get(_STEP_SUMMARY)
        is_step = bool(step) and Path(step or "").exists() and path.samefile(step or "")
        if path.stat().st_size and path.suffix not in (".md", ".markdown") and not is_step:
            message = f"{label}: is not appended to: its name does not end in .md, and ${_STEP_SUMMARY} is another file"
            raise UsageError(message, hint="choose another place")


def _append(path: Path, text: str) -> None:
    with system_failures(shown(path)):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as file:
            file.write((f"\n{text}" if file.tell() else text).encode())
