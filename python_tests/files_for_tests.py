"""Files that tests write: empty ones, and pickles with code in them."""

import os
from pathlib import Path
from typing import Any


def touch(path: Path) -> Path:
    """Make an empty file and the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return path


class Evil:
    """Makes a folder as soon as it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.trace),)
