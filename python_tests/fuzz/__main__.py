"""The command line of the harness."""

import argparse
import sys
from pathlib import Path

from .registry import KINDS_FOLDER
from .supervisor import run

MOST_SHOWN = 20


def main() -> int:
    """Run what the options say; print the table and every fault; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m python_tests.fuzz", description=__doc__)
    amount = parser.add_mutually_exclusive_group()
    amount.add_argument("--seconds", type=float, help="how long, in all (default: 60)")
    amount.add_argument("--count", type=int, help="cases of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first case of each kind")
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="KIND", help="names, or patterns such as 'yaml-*'"
    )
    parser.add_argument(
        "--kinds", type=Path, default=KINDS_FOLDER, help="folder with the modules of the kinds"
    )
    given = parser.parse_args()
    seconds = 60.0 if given.count is None and given.seconds is None else given.seconds
    try:
        report = run(
            seconds=seconds,
            count=given.count,
            seed=given.seed,
            first=given.first,
            only=given.only,
            folder=given.kinds,
        )
    except ValueError as error:
        parser.error(str(error))
    for fault in report.faults[:MOST_SHOWN]:
        print(fault, end="\n\n")
    if (left := len(report.faults) - MOST_SHOWN) > 0:
        print(f"and {left} more\n")
    print(report.table())
    return 1 if report.faults else 0


if __name__ == "__main__":
    sys.exit(main())
