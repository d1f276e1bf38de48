"""The application object that every command registers with, and how its failures are told."""

import os
import shlex
import signal
import sys
import traceback
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, suppress
from typing import Annotated

import typer

from timm_ext.errors import InputError
from timm_ext.system.locks import is_first_of_launched
from timm_ext.system.signals import ending, heard, received, watched
from timm_ext.system.terminal import accept_any_text, say

INTERRUPTED_BY = 128  # and the number of the signal
INTERRUPTED = INTERRUPTED_BY + signal.SIGINT
USAGE = 2
GO_ON: dict[str, tuple[str, ...]] = {
    "train": ("--resume",),
    "adapt": ("--resume",),
    **dict.fromkeys(("fisher", "demo", "study", "phantom", "prepare"), ()),
}
"""Commands that go on where they were interrupted, and what they must be given for it."""

app = typer.Typer(
    name="timm-ext",
    help="Merge pre-trained 3-D segmentation networks into one initialisation for a new task.",
    add_completion=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)

_until_it_ends = ExitStack()


def _tell_version(wanted: bool) -> None:
    if wanted:
        import timm_ext

        say(f"timm-ext {timm_ext.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of a failure (anywhere).")
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_tell_version, is_eager=True, help="Print the version.")
    ] = False,
    plugin: Annotated[
        list[str] | None,
        typer.Option(
            "--plugin", metavar="MODULE", help="Import a Python module that registers networks (anywhere)."
        ),
    ] = None,
) -> None:
    """Merge pre-trained 3-D segmentation networks into one initialisation for a new task."""


def run(arguments: Sequence[str]) -> int:
    """Run one command and return its exit status; every failure is one line on standard error.

    Args:
        arguments: without the program's name; `--debug` may stand anywhere.

    Returns:
        0 if it worked, 1 for a failure, 2 for wrong usage, 128 + N if interrupted by signal N: 130 for
        Ctrl-C, 143 for SIGTERM, 129 for a terminal that was closed.
    """
    with watched(held=True):
        return _run(list(arguments))


def _run(arguments: list[str]) -> int:
    debug, plugins, rest = _common(arguments)
    accept_any_text()
    command = typer.main.get_command(app)
    try:
        with _until_it_ends, warnings.catch_warnings(), heard():
            if not debug:
                warnings.simplefilter("ignore")
            _import(plugins)
            status = command.main(rest or ["--help"], prog_name="timm-ext", standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        return _tell_interrupted(arguments)
    except Exception as error:
        if debug:
            traceback.print_exc()
        return _tell(*_explain(error))
    if status == INTERRUPTED:  # newer typers turn Ctrl-C into this status without a word
        return _tell_interrupted(arguments)
    return status if isinstance(status, int) else 0


def _common(arguments: Sequence[str]) -> tuple[bool, list[str], list[str]]:
    """Take the options of all commands out, wherever they stand: `--debug`, the plugins, all others."""
    debug, plugins, rest = False, [], []
    left = iter(arguments)
    for argument in left:
        if argument == "--debug":
            debug = True
        elif argument == "--plugin" and (module := next(left, None)) is not None:
            plugins.append(module)
        elif argument.startswith("--plugin="):
            plugins.append(argument.partition("=")[2])
        else:
            rest.append(argument)
    return debug, plugins, rest


def _import(plugins: Sequence[str]) -> None:
    if plugins:
        from timm_ext.networks.plugins import import_plugin

        for module in plugins:
            import_plugin(module)


def hold(context: AbstractContextManager[object]) -> None:
    """Enter a context, such as a lock, until the command that runs ends."""
    _until_it_ends.enter_context(context)


def _tell(message: str, status: int) -> int:
    with suppress(OSError):  # of a terminal that is gone
        sys.stdout.flush()  # what was printed before the failure comes before it
        say(f"error: {message}", lines=True, file=sys.stderr)
    return status


def _tell_interrupted(arguments: list[str]) -> int:
    """Say how to go on, once for all processes of a run."""
    with ending():
        number = received() or signal.SIGINT
        how = "" if number == signal.SIGINT else f" by {signal.Signals(number).name}"
        if is_first_of_launched():
            _tell(f"interrupted{how}{_going_on(arguments)}", INTERRUPTED_BY + number)
        return INTERRUPTED_BY + number


def _going_on(arguments: list[str]) -> str:
    command = next((argument for argument in _common(arguments)[2] if not argument.startswith("-")), "")
    if command not in GO_ON:
        return ""
    missing = [option for option in GO_ON[command] if option not in arguments]
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return f"; go on with the same torchrun command{' and '.join(['', *missing])}"
    return f"; go on with: {shlex.join(['timm-ext', *arguments, *missing])}"


def _explain(error: Exception) -> tuple[str, int]:
    """Return what to print for an exception, and the exit status."""
    if isinstance(error, InputError):
        return str(error), 1
    if (usage := getattr(error, "format_message", None)) is not None:
        return f"{' '.join(usage().split())} (see timm-ext --help)", USAGE
    if isinstance(error, OSError):
        return str(InputError(f"{error.filename or 'file'}: {error.strerror or error}")), 1
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text} (run again with --debug for the traceback)", 1
