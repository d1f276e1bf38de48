"""The one exception type for input that the user can mend, and how its messages list things."""

from collections.abc import Iterable

MOST_LISTED = 10


class InputError(ValueError):
    """Input that cannot be used, told in one line: what it is, what was expected, what came.

    The command line prints the message without a traceback and exits with status 1.
    """


def listed(items: Iterable[object], most: int = MOST_LISTED) -> str:
    """Join items by commas; of a long list the first `most`, and how many more there are."""
    every = [str(item) for item in items]
    return ", ".join(_first(every, most))


def lines_of(items: Iterable[object], most: int = MOST_LISTED) -> str:
    """Put each item on an indented line of its own behind a message; of a long list the first `most`."""
    every = [str(item) for item in items]
    return "".join(f"\n  {line}" for line in _first(every, most))


def _first(items: list[str], most: int) -> list[str]:
    left = len(items) - most
    return items if left <= 0 else [*items[:most], f"and {left} more"]
