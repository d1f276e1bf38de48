"""Modules of users that register networks: named to a command, or installed with an entry point."""

import importlib
import sys
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path

from timm_ext.errors import InputError, first_line, shown

GROUP = "timm_ext.networks"


def import_plugin(name: str) -> None:
    """Import a module that calls `register_network`; the current folder is searched, too.

    Raises:
        InputError: it cannot be imported.
    """
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)
    try:
        importlib.import_module(name)
    except Exception as error:  # a module of a user may raise anything
        reason = f"{type(error).__name__}: {shown(first_line(error))}"
        raise InputError(f"--plugin: expected a Python module that can be imported (got {reason})") from error


@cache
def load_installed() -> None:
    """Load what installed packages name in the entry-point group `timm_ext.networks`, once.

    An entry is a module that registers networks, or a function that does.

    Raises:
        InputError: an entry cannot be loaded.
    """
    for entry in entry_points(group=GROUP):
        try:
            loaded = entry.load()
            if callable(loaded):
                loaded()
        except Exception as error:  # a package of a user may raise anything
            reason = f"{type(error).__name__}: {shown(first_line(error))}"
            raise InputError(
                f"{GROUP}: {entry.name}: expected an entry point that can be loaded (got {reason})"
            ) from error
