"""A source network of a study, as a plan file says it."""

from functools import cached_property
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from timm_ext.data.tasks import Region, Task, get_task
from timm_ext.documents.fields import Flag, whole
from timm_ext.errors import InputError, listed
from timm_ext.files import real_path

_MOST_NUMBER = 100_000

DataPath = Annotated[str, AfterValidator(lambda path: str(real_path(path)))]
HeadLabel = Annotated[int, whole(1, _MOST_NUMBER)]
HeadLabels = tuple[HeadLabel, ...]
Regions = dict[str, Annotated[HeadLabels, Field(min_length=1)]]
_OF_CROPS = ("around", "mirrored", "modality", "shuffled")


def heads(modality: str) -> Task:
    """Return what is read of the whole heads that crops are cut from; their labels stay aside."""
    return Task("heads", (modality,), (), frozenset())


class PlannedSource(BaseModel):
    """What one of the source networks is trained for, on which cases, and starting from what.

    Attributes:
        task: its task; or else `name` and `regions`.
        name: of a task of its own.
        regions: name → numbers in the label maps of whole heads (FreeSurfer's, as a rule). The cases are
            crops of these, of the size that networks see.
        around: numbers of the structures that crops are centred on, one crop for each; by default both
            hippocampi.
        mirrored: those of them whose crops are mirrored, left to right; by default the left hippocampus.
        modality: of the heads' images.
        data: cases on disk; None takes the plan's `source_data`.
        after: number of the source, counted from 1, whose network it starts from; None starts from a seed.
        shuffled: put the labels of each crop elsewhere in it: a source of the same labels that is of no use.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    task: str | None = None
    name: str | None = None
    regions: Regions = {}
    around: Annotated[HeadLabels, Field(min_length=1)] = (17, 53)
    mirrored: HeadLabels = (17,)
    modality: Annotated[str, Field(min_length=1)] = "T1"
    data: DataPath | None = None
    after: Annotated[int, whole(1, 1000)] | None = None
    shuffled: Flag = False

    @model_validator(mode="after")
    def _is_a_task(self) -> "PlannedSource":
        own = self.name is not None and bool(self.regions)
        if own == (self.task is not None) or (not own and (self.name is not None or self.regions)):
            raise InputError("expected a task, or name and regions of one's own")
        usual = {name: type(self).model_fields[name].default for name in _OF_CROPS}
        changed = [name for name, value in usual.items() if getattr(self, name) != value]
        if changed and not own:
            raise InputError(f"{changed[0]}: expected regions of one's own, whose crops are made here")
        if len({*self.around}) < len(self.around):
            raise InputError(f"around: expected each number once (got {listed(self.around)})")
        strangers = sorted({*self.mirrored} - {*self.around})
        if "mirrored" in changed and strangers:
            raise InputError(
                f"mirrored: expected some of {listed(self.around)}, which crops are around (got "
                f"{strangers[0]})"
            )
        return self

    @cached_property
    def read_as(self) -> Task:
        """What the cases on disk are read as: the task, or whole heads.

        Raises:
            InputError: there is no such task.
        """
        return heads(self.modality) if self.task is None else get_task(self.task)

    @property
    def crops(self) -> tuple[Any, ...]:
        """What the crops of a head are like; those of sources that agree in it are the same."""
        return tuple(getattr(self, name) for name in _OF_CROPS)

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
        return Task(str(self.name), (self.modality,), regions, frozenset(range(len(numbers) + 1)))
