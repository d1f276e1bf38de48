"""The rows of a study: the arms, and what needs several fine-tunings or a source network of its own."""

from dataclasses import dataclass
from typing import Literal

from timm_ext.merging.merge import look_up, transfer
from timm_ext.transfer.arms import Arm, arms

_WORTSMAN = "Wortsman et al., Model soups, ICML 2022"


@dataclass(frozen=True)
class Combination:
    """The mean, of weights or logits, of the networks that were fine-tuned from each of the source models.

    Attributes:
        name: in commands and files.
        title: in tables and figures.
        paper: source, and the equation.
        mean_of: what the mean is taken of.
    """

    name: str
    title: str
    paper: str
    mean_of: Literal["weights", "logits"]
    models = 2


@dataclass(frozen=True)
class JointTransfer:
    """A transfer from a source network of its own, which was trained on the cases of all source tasks.

    Attributes:
        name: in commands and files.
        title: in tables and figures.
        paper: what it is.
        number: of the source task whose regions it was trained for, counted from 1; None for those of all.
    """

    name: str
    title: str
    paper: str
    number: int | None = None

    @property
    def models(self) -> int:
        """The least number of source tasks."""
        return self.number or 1

    @property
    def arm(self) -> Arm:
        """What is done with that network."""
        return Arm(self.name, self.title, self.paper, transfer(1))


Row = Arm | Combination | JointTransfer

ROWS: tuple[Combination | JointTransfer, ...] = (
    Combination(
        "soup",
        "Uniform soup, T trainings",
        f"{_WORTSMAN}: θ* = Σ θ_t / T over the networks fine-tuned from each of the T source models",
        "weights",
    ),
    Combination(
        "ensemble",
        "Logit ensemble, T trainings, T-fold inference",
        f"{_WORTSMAN}: mean logits of the networks fine-tuned from each of the T source models",
        "logits",
    ),
    JointTransfer(
        "transfer-joint",
        "Transfer from joint training",
        "the control: one network trained on the cases and regions of all source tasks at once",
    ),
)
"""What a study has beside its arms and `transfer_from_all`."""


def transfer_from_all(number: int) -> JointTransfer:
    """Return the transfer from a network for source task `number` alone, trained on all source cases."""
    one = transfer(number)
    return JointTransfer(
        f"{one.name}-all",
        f"{one.title}, all source cases",
        "the control: one network for one source task, trained on the cases of all source tasks",
        number,
    )


def rows(*numbers: int) -> dict[str, Row]:
    """Return all rows by name, with the transfers from the source models of these numbers."""
    return arms(*numbers) | {row.name: row for row in (*map(transfer_from_all, numbers), *ROWS)}


def get_row(name: str) -> Row:
    """Look a row up by name.

    Raises:
        InputError: there is no such row; the known ones are listed.
    """
    return look_up(name, rows)


def arm_of(name: str) -> Arm:
    """Return what a row does with the source networks that it is given.

    Raises:
        InputError: there is no such row.
    """
    row = get_row(name)
    assert not isinstance(row, Combination)
    return row.arm if isinstance(row, JointTransfer) else row
