"""A source network of a study, as a plan file says it."""

from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from timm_ext.data.tasks import Region, Task, get_task
from timm_ext.documents.fields import Flag, whole
from timm_ext.errors import InputError
from timm_ext.files import real_path

_MOST_NUMBER = 100_000

HEADS = Task("heads", ("T1",), (), frozenset())
"""What is read of the whole heads that sources with regions of their own are cut from; labels aside."""

DataPath = Annotated[str, AfterValidator(lambda path: str(real_path(path)))]
HeadLabel = Annotated[int, whole(1, _MOST_NUMBER)]
Regions = dict[str, Annotated[tuple[HeadLabel, ...], Field(min_length=1)]]


class PlannedSource(BaseModel):
    """What one of the source networks is trained for, on which cases, and starting from what.

    Attributes:
        task: its task; or else `name` and `regions`.
        name: of a task of its own.
        regions: name → numbers in the label maps of whole heads (FreeSurfer's). The cases are crops around
            both hippocampi, of the size that networks see, the left one mirrored.
        data: cases on disk; None takes the plan's `source_data`.
        after: number of the source, counted from 1, whose network it starts from; None starts from a seed.
        shuffled: put the labels of each crop elsewhere in it: a source of the same labels that is of no use.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    task: str | None = None
    name: str | None = None
    regions: Regions = {}
    data: DataPath | None = None
    after: Annotated[int, whole(1, 1000)] | None = None
    shuffled: Flag = False

    @model_validator(mode="after")
    def _is_a_task(self) -> "PlannedSource":
        own = self.name is not None and bool(self.regions)
        if own == (self.task is not None) or (not own and (self.name is not None or self.regions)):
            raise InputError("expected a task, or name and regions of one's own")
        if self.shuffled and not own:
            raise InputError("shuffled: expected regions of one's own, whose crops are made here")
        return self

    def settled(self, numbers: tuple[int, ...]) -> Task:
        """Return the task, on label maps that hold 1 for the first of some head labels, 2 for the next, ….

        Raises:
            InputError: there is no such task.
        """
        if self.task is not None:
            return get_task(self.task)
        regions = tuple(
            Region(name, tuple(numbers.index(label) + 1 for label in labels))
            for name, labels in self.regions.items()
        )
        return Task(str(self.name), HEADS.modalities, regions, frozenset(range(len(numbers) + 1)))
