"""The one exception type for input that the user can mend, and how its messages show and list things."""

import copy
import re
from collections.abc import Iterable
from typing import Self

MOST_LISTED = 10
MOST_SHOWN = 200
MOST_OF_LINE = 1500

_LOOSE_NEWLINE = re.compile(r"\n(?!  )")  # a line of `lines_of` is indented


class InputError(ValueError):
    """Input that cannot be used, told in one line: what it is, what was expected, what came.

    The command line prints the message without a traceback and exits with status 1. Control characters, which
    names of files and cases may hold, are shown as escapes, so that no name can steer the terminal.
    """

    def __init__(self, message: object = "") -> None:
        text = printable(_LOOSE_NEWLINE.sub(r"\\n", str(message)), keep="\n")
        super().__init__("\n".join(map(_without_middle, text.split("\n"))))

    def hinted(self, hint: str) -> Self:
        """Return an error of the same kind with a further line, of what can be done."""
        other = copy.copy(self)
        other.args = InputError(f"{self}\n  {hint}").args
        return other


def _without_middle(line: str) -> str:
    """Leave out the middle of a line that is too long to be read, as a path of thousands of characters."""
    if len(line) <= MOST_OF_LINE:
        return line
    return f"{line[: MOST_OF_LINE // 2]} … {line[-MOST_OF_LINE // 2 :]}"


def printable(text: str, keep: str = "") -> str:
    """Show control characters, line ends and halves of surrogate pairs as escapes, except for `keep`."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in keep else repr(c)[1:-1] for c in text)


def shown(value: object, most: int = MOST_SHOWN) -> str:
    """Return a value as text for a message: on one line, and of a long one the beginning."""
    text = printable(" ".join(str(value).split()) if "\n" in str(value) else str(value))
    return text if len(text) <= most else f"{text[:most]}… ({len(text)} characters)"


def first_line(error: BaseException) -> str:
    """Return the first line that an exception of another program says, or its type."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def listed(items: Iterable[object], most: int = MOST_LISTED, separator: str = ", ") -> str:
    """Join items, as a rule by commas; of a long list the first `most`, and how many more there are."""
    every = [printable(str(item)) for item in items]
    return separator.join(_first(every, most))


def lines_of(items: Iterable[object], most: int = MOST_LISTED) -> str:
    """Put each item on an indented line of its own behind a message; of a long list the first `most`."""
    every = [printable(str(item)) for item in items]
    return "".join(f"\n  {line}" for line in _first(every, most))


def _first(items: list[str], most: int) -> list[str]:
    left = len(items) - most
    return items if left <= 0 else [*items[:most], f"and {left} more"]
