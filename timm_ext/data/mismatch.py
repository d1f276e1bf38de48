"""The refusal of data that do not fit a task, by which commands know what to advise."""

from collections.abc import Iterable

from timm_ext.errors import InputError


class TaskMismatchError(InputError):
    """Data that are not what a task asks for.

    Attributes:
        task: its name.
        missing: modalities of the task that cases do not have.
    """

    def __init__(self, message: object = "", task: str = "", missing: Iterable[str] = ()) -> None:
        super().__init__(message)
        self.task = task
        self.missing = tuple(missing)
