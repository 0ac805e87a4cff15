"""The check that nothing was skipped, which the tests of Keras run under, can fail."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.mark.parametrize(("body", "code"), [("pass", 0), ("pytest.skip('no framework')", 1)])
@pytest.mark.parametrize("workers", [(), ("-n", "1")])
def test_a_skipped_test_fails_the_run(pytester, body, code, workers):
    conftest = Path(__file__).parent.joinpath("conftest.py").read_text()
    pytester.makeconftest(conftest.replace('pytest_plugins = ["pytester"]', ""))
    pytester.makepyfile(f"import pytest\ndef test_one():\n    {body}\n")
    assert pytester.runpytest_subprocess("--no-skips", *workers).ret == code
    assert pytester.runpytest_subprocess(*workers).ret == 0
