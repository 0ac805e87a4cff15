"""``python -m tests.cases accept [KIND]...``: take what is said now for what is to be said."""

from __future__ import annotations

import argparse

from . import KINDS, write_table

if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m tests.cases", description=__doc__)
    parser.add_argument("what", choices=["accept"])
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=f"all, or some of: {', '.join(KINDS)}")
    for kind in (given := parser.parse_args()).kinds or KINDS:
        write_table(kind)
