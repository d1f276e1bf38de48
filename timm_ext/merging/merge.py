"""Pure merges: from the bank of source models to the shared weights of a target network, without data."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from math import isfinite
from typing import TypeVar

import torch
from torch import Tensor

from timm_ext.errors import InputError
from timm_ext.merging.bank import Bank, Normalization
from timm_ext.ops.merge import fused_merge

LEE = "Lee et al., Overcoming Catastrophic Forgetting by Incremental Moment Matching, NeurIPS 2017"
GEYER = "Geyer et al., Transfer Learning by Adaptive Merging of Multiple Models, MIDL 2019"
AINSWORTH = "Ainsworth et al., Git Re-Basin: Merging Models modulo Permutation Symmetries, ICLR 2023"

Row = TypeVar("Row")

_MOST_DIGITS = 7  # of the number of a source model


@dataclass(frozen=True)
class Merge:
    """One way from source models to the shared weights of a target network.

    Attributes:
        name: in commands and files.
        title: in tables and figures.
        paper: source, and the equation.
        weights: the shared weights `[P]` from the bank; None leaves them as they were initialised.
        needs_fisher: the bank's Fishers are used.
        models: the least number of source models.
        aligned: the channels of the sources are first brought into the order of the first one's, see `align`.
        normalize: how the Fishers of the bank are scaled before merging, see `Bank.build`.
        transfer_norms: the norms are shared, too.
    """

    name: str
    title: str
    paper: str
    weights: Callable[[Bank], Tensor] | None
    needs_fisher: bool = False
    models: int = 1
    aligned: bool = False
    normalize: Normalization | None = None
    transfer_norms: bool = False

    @property
    def source(self) -> int | None:
        """The index of the one source model that it takes; None where it takes several or none."""
        weights = self.weights
        single = isinstance(weights, partial) and weights.func is one_model
        return weights.keywords["index"] if isinstance(weights, partial) and single else None

    @property
    def uniform(self) -> bool:
        """Whether it is a `MergedModel` of equal ratios, in whose place others may be learned."""
        weights = self.weights
        return (
            isinstance(weights, partial)
            and weights.func is uniform_merge
            and weights.keywords == {"with_fisher": self.needs_fisher}
        )


def uniform_merge(bank: Bank, *, with_fisher: bool) -> Tensor:
    """Return the merge `[P]` with equal ratios.

    With Fishers θ*_p = Σ_t F[t,p] θ[t,p] / Σ_t F[t,p] (mode-IMM), without them the mean (mean-IMM).

    Raises:
        InputError: Fishers are wanted and the bank has none.
    """
    if with_fisher and bank.fisher is None:
        raise InputError("mode-imm: expected a bank with Fishers (got one without)")
    whole = torch.tensor([0, bank.layout.numel], device=bank.matrices.device)
    equal = torch.zeros(1, len(bank), device=bank.matrices.device)
    return fused_merge(bank.theta, bank.fisher if with_fisher else None, equal, whole)


def merge_by(bank: Bank, *, ratios: tuple[float, ...], with_fisher: bool) -> Tensor:
    """Return the merge `[P]` with given ratios r, θ*_p = Σ_t r_t F[t,p] θ[t,p] / Σ_t r_t F[t,p], or F = 1."""
    whole = torch.tensor([0, bank.layout.numel], device=bank.matrices.device)
    given = torch.tensor([ratios], dtype=torch.float64, device=bank.matrices.device)
    return fused_merge(bank.theta, bank.fisher if with_fisher else None, given, whole, mixing="ratios")


def one_model(bank: Bank, *, index: int) -> Tensor:
    """Return the weights `[P]` of one source model."""
    return bank.theta[index].clone()


_mean = partial(uniform_merge, with_fisher=False)
_mode = partial(uniform_merge, with_fisher=True)

SCRATCH = Merge("scratch", "From scratch", "the network's own initialisation", None, models=0)
MEAN = Merge("mean-imm", "Mean-IMM", f"{LEE}: θ* = Σ θ_t / T", _mean)
MODE = Merge("mode-imm", "Mode-IMM", f"{LEE}: θ* = Σ F_t θ_t / Σ F_t", _mode, needs_fisher=True)
MODE_NORMALIZED = Merge(
    "mode-imm-normalized",
    "Mode-IMM, Fishers normalised",
    f"{LEE}: θ* = Σ F_t θ_t / Σ F_t, each tensor's F_t divided by its sum as in {GEYER}",
    _mode,
    needs_fisher=True,
    normalize="tensor",
)
MEAN_ALIGNED = Merge(
    "mean-aligned", "Mean, aligned", f"{AINSWORTH}: θ* = Σ π_t(θ_t) / T", _mean, aligned=True
)
MODE_ALIGNED = Merge(
    "mode-imm-aligned",
    "Mode-IMM, aligned",
    f"{LEE}: θ* = Σ F_t θ_t / Σ F_t, aligned as in {AINSWORTH}",
    _mode,
    needs_fisher=True,
    aligned=True,
)

MERGES = (MEAN, MODE, MODE_NORMALIZED, MEAN_ALIGNED, MODE_ALIGNED)
"""All merges but `SCRATCH` and `transfer`."""


@cache
def transfer(number: int) -> Merge:
    """Return the merge that takes source model `number`, counted from 1, alone."""
    weights = partial(one_model, index=number - 1)
    paper = "all shared weights of one source model"
    return Merge(f"transfer-{number}", f"Transfer from M{number}", paper, weights, models=number)


def by_ratios(ratios: Sequence[float], models: int, *, with_fisher: bool) -> Merge:
    """Return the merge of all source models by given ratios; their sum does not matter.

    Raises:
        InputError: as for `check_ratios`.
    """
    check_ratios(ratios, models)
    weights = partial(merge_by, ratios=tuple(ratios), with_fisher=with_fisher)
    title = f"merge by ratios {', '.join(f'{ratio / sum(ratios):.4g}' for ratio in ratios)}"
    equation = "θ* = Σ r_t F_t θ_t / Σ r_t F_t" if with_fisher else "θ* = Σ r_t θ_t / Σ r_t"
    return Merge("ratios", title, equation, weights, needs_fisher=with_fisher, models=models)


def check_ratios(ratios: Sequence[float], models: int) -> None:
    """Refuse ratios that are not one non-negative number for each model, or all 0.

    Raises:
        InputError: as said.
    """
    got = ", ".join(map(str, ratios))
    if not models or len(ratios) != models:
        raise InputError(f"ratios: expected one for each of {models} checkpoints (got {len(ratios)}: {got})")
    if not all(isfinite(ratio) and ratio >= 0 for ratio in ratios) or max(ratios) == 0:
        raise InputError(f"ratios: expected finite numbers >= 0, not all of them 0 (got {got})")


def merges(*numbers: int) -> dict[str, Merge]:
    """Return the merges by name, those of single source models for these numbers, counted from 1."""
    return {merge.name: merge for merge in (SCRATCH, *map(transfer, numbers), *MERGES)}


def get_merge(name: str) -> Merge:
    """Look a merge up by name.

    Raises:
        InputError: there is no such merge; the known ones are listed.
    """
    return look_up(name, merges)


def look_up(name: str, table: Callable[..., Mapping[str, Row]]) -> Row:
    """Return a row of a table by name.

    Args:
        name: of the row.
        table: rows by name, with those of the source models of some numbers: the ones that the name holds.

    Raises:
        InputError: there is no such row; the known ones are listed.
    """
    numbers = [int(part) for part in name.split("-") if part.isdecimal() and len(part) <= _MOST_DIGITS]
    if (row := table(*(number for number in numbers if number)).get(name)) is None:
        raise InputError(f"method: expected one of {', '.join(table(1, 2))}, … (got {name!r})")
    return row
