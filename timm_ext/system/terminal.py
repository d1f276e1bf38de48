"""What commands print: names as they are, never as markup or as orders to the terminal, in any encoding."""

import codecs
import sys
from collections.abc import Iterable, Sequence
from datetime import timedelta
from typing import IO, TYPE_CHECKING, Any

from timm_ext.errors import printable

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, ProgressColumn, Task, TaskID
    from rich.text import Text

_IN_ASCII = {
    "±": "+-",
    "×": "x",
    "·": ".",
    "≥": ">=",
    "≤": "<=",
    "…": "...",
    "→": "->",
    "Σ": "sum",
    "²": "^2",
    **dict.fromkeys("–—−", "-"),
    **dict.fromkeys("“”„", '"'),
    **dict.fromkeys("‘’", "'"),
    "α": "alpha",
    "δ": "delta",
    "θ": "theta",
    "λ": "lambda",
    "μ": "mu",
    "Δ": "Delta",
    **dict.fromkeys("─━╺╸╴╶", "-"),
    **dict.fromkeys("│┃", "|"),
}
_ERRORS = "timm_ext.ascii"


def accept_any_text(*streams: IO[str]) -> None:
    """Let streams whose encoding lacks a character write what comes closest, or its escape.

    Args:
        streams: by default standard output and standard error.
    """
    codecs.register_error(_ERRORS, _in_ascii)
    for stream in streams or (sys.stdout, sys.stderr):
        if (reconfigure := getattr(stream, "reconfigure", None)) is not None:
            reconfigure(errors=_ERRORS)


def say(text: object, *, lines: bool = False, file: IO[str] | None = None) -> None:
    """Print a line, or several; control characters in it, which names may hold, are shown and do not act."""
    print(printable(str(text), keep="\n" if lines else ""), file=file, flush=True)


def make_console(*, stderr: bool = False) -> "Console":
    """Return a console that takes texts as they are."""
    from rich.console import Console

    return Console(stderr=stderr, markup=False, emoji=False, highlight=False)


def tell(console: "Console", text: object, *, lines: bool = False) -> None:
    """Print on a console, as `say` does."""
    line = printable(str(text), keep="\n" if lines else "")
    console.print(line, markup=False, emoji=False, highlight=False, soft_wrap=True)


def show_table(
    console: "Console", heads: Sequence[str], rows: Iterable[Sequence[object]], *, title: str
) -> None:
    """Print a table whose cells may hold any text."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(printable(title), "italic"))
    for head in heads:
        table.add_column(Text(printable(head)), overflow="fold")
    for row in rows:
        table.add_row(*(Text(printable(str(cell))) for cell in row))
    console.print(table)


def make_bars(*columns: "ProgressColumn", console: "Console | None" = None, **options: Any) -> "Progress":
    """Return progress bars, each headed by its description as it is, with the time taken and left at its end.

    The time left is a task's field `left` in seconds, or what its speed gives where it has none.

    Args:
        *columns: between bar and times; by default the percentage.
        console: where to; by default standard output.
        **options: of `rich.progress.Progress`.
    """
    from rich.progress import BarColumn, Progress, ProgressColumn, TaskProgressColumn, TextColumn
    from rich.text import Text

    class Bars(Progress):
        def add_task(self, description: str, *arguments: Any, **fields: Any) -> "TaskID":
            return super().add_task(printable(description), *arguments, **fields)

    class Times(ProgressColumn):
        max_refresh = 0.5

        def render(self, task: "Task") -> "Text":
            taken = task.finished_time if task.finished else task.elapsed
            left = task.fields.get("left", task.time_remaining)
            return Text(f"{clock(taken)}, left {clock(left)}", "progress.remaining")

    head = TextColumn("{task.description}", markup=False)
    middle = columns or (TaskProgressColumn(),)
    return Bars(head, BarColumn(), *middle, Times(), console=console or make_console(), **options)


def clock(seconds: float | None) -> str:
    """Return a duration as `h:mm:ss`, dashes for an unknown one."""
    return "-:--:--" if seconds is None else str(timedelta(seconds=round(seconds)))


def _in_ascii(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lost = error.object[error.start : error.end]
    return "".join(
        _IN_ASCII.get(c) or c.encode("ascii", "backslashreplace").decode() for c in lost
    ), error.end


def duration(seconds: float) -> str:
    """Return a duration for readers."""
    for unit, length in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} s"
