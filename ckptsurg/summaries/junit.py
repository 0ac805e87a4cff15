"""What a verify came to as JUnit XML, which pages of test results show.

A tensor that fails is a test case, up to a hundred of them; those that hold are one case together, whose name is the
same in every run. So a page of 100,000 tensors is as short as one of 300, and a history shows what became red.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING

from ..causes import explained
from ..report import Aside, Difference
from ..wording import shown
from .outcomes import Outcome, headline

if TYPE_CHECKING:
    from junitparser import TestCase, TestSuite

__all__ = ["is_ours", "not_verified", "render"]

_SUITE = "ckptsurg verify"
_HELD = "frozen tensors that have their bits"
#: Of test cases, and of names that are listed in one.
_MOST_CASES, _MOST_NAMES = 100, 1000
#: Of a name, in characters: by its name a page tells one test case from another.
_LONGEST_NAME = 1000
_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_OURS = re.compile(rb"<\?xml [^>]*>\s*<testsuites name=\"" + _SUITE.encode() + rb"\"")


def render(outcome: Outcome) -> bytes:
    """The document; it has failures if the report is not ``ok``, and no others."""
    from junitparser import SystemOut

    report, failed = outcome.report, outcome.failed
    suite = _suite()
    for name, value in (
        ("ckptsurg", version("ckptsurg")),
        ("root", outcome.manifest.root),
        ("frozen_root", outcome.manifest.frozen_root),
        ("relied_on", report.relied_on or "nothing"),
        ("verified", str(report.verified)),
        ("drifted", str(len(failed))),
    ):
        suite.add_property(name, value)
    for difference in failed[:_MOST_CASES]:
        suite.add_testcase(_of_difference(difference))
    if rest := failed[_MOST_CASES:]:
        lines = _listed([difference.describe() for difference in rest])
        suite.add_testcase(_case("further frozen tensors", f"{len(rest):,} more; --json lists all", "changed", lines))
    if report.verified:
        accepted = [difference.describe() for difference in outcome.accepted]
        case = _case(_HELD)
        case.system_out = _text([f"{report.verified:,} of {outcome.manifest.counts['frozen']:,}", *_listed(accepted)])
        suite.add_testcase(case)
    if outcome.exact:
        others = [aside for aside in report.asides() if aside.kind != "untrained"]
        message = "not exactly the manifest's tensors" if others else ""
        suite.add_testcase(_case("exactly the manifest's tensors", message, "exact", _told(others)))
    if report.untrained is not None:
        still = [aside for aside in report.asides() if aside.counts]
        message = ", ".join(aside.words for aside in still)
        suite.add_testcase(_case("trainable tensors that moved", message, "untrained", _told(still)))
    said = [headline(report), f"checkpoint: {outcome.checkpoint}", f"manifest: {outcome.manifest_path}", report.note]
    hints = [f"hint: {hint}" for hint in outcome.hints]
    suite.append(SystemOut(_text([*filter(None, said), *_told(report.asides()), *hints])))
    return _document(suite)


def not_verified(checkpoint: str, message: str) -> bytes:
    """The document of a verify that came to nothing: an error, which is no failure.

    Args:
        checkpoint: What was to be verified.
        message: Why it was not.
    """
    from junitparser import Error, SystemOut

    suite, case = _suite(), _case(_HELD)
    error = Error(_xml(message.partition("\n")[0]), "not verified")
    error.text = _xml(message)
    case.result = error
    suite.add_testcase(case)
    suite.append(SystemOut(_text([f"checkpoint: {checkpoint}"])))
    return _document(suite)


def is_ours(beginning: bytes) -> bool:
    """Whether a file that begins so was made here; one without a byte counts, for nothing is lost with it."""
    return not beginning or _OURS.match(beginning) is not None


def _suite() -> TestSuite:
    from junitparser import TestSuite

    return TestSuite(_SUITE)


def _document(suite: TestSuite) -> bytes:
    from junitparser import JUnitXml

    suite.update_statistics()
    document = JUnitXml(_SUITE)
    document.append(suite)
    content: bytes = document.tostring()
    if not content.startswith(b"<?xml"):  # as lxml has it, which junitparser takes where it is there
        content = b"<?xml version='1.0' encoding='utf-8'?>\n" + content
    return content + b"\n"


def _of_difference(difference: Difference) -> TestCase:
    name = shown(difference.name, _LONGEST_NAME)
    said = [difference.describe()]
    if difference.cause:
        said.append(explained(difference.cause))
    if difference.hint:
        said.append(f"hint: {difference.hint}")
    parts = (difference.describe_detail(), f"cause: {difference.cause}" if difference.cause else "")
    message = "; ".join(part for part in (difference.verdict, *parts) if part)
    # Pages show a tensor in its module as they show a test in its class.
    modules = re.split("[./]", name)[:-1]
    classname = ".".join(part for part in ("frozen", *modules) if part)
    return _case(name, message, difference.verdict, said, classname)


def _case(
    name: str, message: str = "", kind: str = "", said: Sequence[str] = (), classname: str = "frozen"
) -> TestCase:
    """A test case; it fails if there is a message."""
    from junitparser import Failure, TestCase

    case = TestCase(_xml(name), _xml(classname))
    if message:
        failure = Failure(_xml(message), kind)
        failure.text = _text(said)
        case.result = failure
    return case


def _told(asides: Iterable[Aside]) -> list[str]:
    lines = []
    for aside in asides:
        lines += [f"{aside.words}:", *_listed([f"  {shown(tensor)}" for tensor in aside.tensors])]
    return lines


def _listed(lines: list[str]) -> list[str]:
    more = len(lines) - _MOST_NAMES
    return lines if more <= 0 else [*lines[:_MOST_NAMES], f"... and {more:,} more; --json lists all"]


def _text(lines: Iterable[str]) -> str:
    return _xml("\n".join(lines))


def _xml(text: str) -> str:
    """What no XML can hold is escaped, and cannot be written as a reference either."""
    return _NOT_XML.sub(lambda match: match[0].encode("unicode_escape").decode("ascii"), text)
