"""The log of a run: one CSV row per step, and TensorBoard events."""

import csv
import errno
import hashlib
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from timm_ext.errors import InputError, listed, shown
from timm_ext.files import reading, writing

if TYPE_CHECKING:
    from torch.utils.tensorboard import writer

Row = dict[str, float | None]

LOG_NAME = "log.csv"
EVENTS_NAME = "tensorboard"
_WHOLE = ("step", "epoch")


class TrainingLog:
    """Appends rows to `log.csv`, whose bytes are a function of the run alone: times are kept elsewhere.

    Args:
        run_dir: folder of the run.
        columns: names of the columns, the first being `step`.
        saved: bytes of the log that belong to the state that is resumed, and their SHA-256; later rows are
            cut off. None starts a new log.
        writes: whether this process writes; the others keep the rows in memory only.
        tensorboard: also write events.

    Attributes:
        path: of the file.
        rows: all rows so far, those of the interrupted run included; None where a column has no value.

    Raises:
        InputError: the log cannot be written, has lost rows or was changed.
    """

    def __init__(
        self,
        run_dir: Path,
        columns: Sequence[str],
        *,
        saved: tuple[int, str] | None = None,
        writes: bool,
        tensorboard: bool,
    ) -> None:
        self.rows: list[Row] = []
        self.path = run_dir / LOG_NAME
        self._events_dir = run_dir / EVENTS_NAME
        self._columns = tuple(columns)
        self._file: io.FileIO | None = None
        self._events: writer.SummaryWriter | None = None
        self._digest = hashlib.sha256()
        if saved is not None:
            data = _read_whole(self.path, *saved)
            self.rows = _rows_of(data, self._columns, self.path)
            self._digest.update(data)
        if writes:
            self._open(0 if saved is None else saved[0])
            if tensorboard:
                from torch.utils.tensorboard.writer import SummaryWriter

                with writing(self._events_dir):
                    self._events = SummaryWriter(self._events_dir, purge_step=len(self.rows) + 1)

    def append(self, row: Row) -> None:
        """Add a row; columns it lacks stay empty.

        Raises:
            InputError: the disk is full.
        """
        row = {name: row.get(name) for name in self._columns}
        self.rows.append(row)
        self._write(_line(["" if value is None else repr(value) for value in row.values()]))
        if self._events is not None:
            with writing(self._events_dir):
                for name, value in row.items():
                    if value is not None and name not in _WHOLE:
                        self._events.add_scalar(name, value, len(self.rows))

    def sync(self) -> tuple[int, str]:
        """Bring the log to the disk; return its bytes and their SHA-256, nothing useful without a file."""
        if self._file is None:
            return 0, ""
        with writing(self.path):
            os.fsync(self._file.fileno())
        return self._file.tell(), self._digest.hexdigest()

    def close(self) -> None:
        """Close the files.

        Raises:
            InputError: the disk is full.
        """
        if self._file is not None:
            self._file.close()
        if self._events is not None:
            with writing(self._events_dir):
                self._events.close()

    def _open(self, length: int) -> None:
        with writing(self.path):
            self._file = open(self.path, "r+b" if length else "wb", buffering=0)  # noqa: SIM115
            self._file.truncate(length)
            self._file.seek(length)
        if not length:
            self._write(_line(self._columns))

    def _write(self, text: str) -> None:
        if self._file is None:
            return
        data = text.encode()
        with writing(self.path):
            if self._file.write(data) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._digest.update(data)


def _line(values: Sequence[str]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(values)
    return text.getvalue()


def _read_whole(path: Path, length: int, sha256: str) -> bytes:
    with reading(path), open(path, "rb") as file:
        data = file.read(length)
    if hashlib.sha256(data).hexdigest() != sha256:
        raise InputError(
            f"{path}: expected the log of the run that is resumed (got another, or rows are lost or changed)"
        )
    return data


def _rows_of(data: bytes, columns: Sequence[str], path: Path) -> list[Row]:
    try:
        header, *lines = csv.reader(io.StringIO(data.decode()), strict=True)
        if header != list(columns):
            raise ValueError(f"the columns {', '.join(header)}")
        return [
            {name: _value(name, text) for name, text in zip(columns, line, strict=True)} for line in lines
        ]
    except (ValueError, csv.Error) as error:
        raise InputError(
            f"{path}: expected a log with the columns {listed(columns)} (got {shown(error)})"
        ) from error


def _value(name: str, text: str) -> float | None:
    if not text:
        return None
    return int(text) if name in _WHOLE else float(text)
