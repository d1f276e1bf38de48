"""The ways to make an initialisation from source models, as one list."""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from timm_ext.errors import InputError
from timm_ext.groups import Granularity
from timm_ext.merging.bank import Bank, Normalization
from timm_ext.ops.merge import fused_merge

_GEYER = "Geyer et al., Transfer Learning by Adaptive Merging of Multiple Models, MIDL 2019"
_ALMAKKY = (
    "Almakky et al., MedMerge: Merging Models for Effective Transfer Learning to Medical Imaging Tasks, "
    "arXiv 2403.11646, 2024"
)
_AINSWORTH = "Ainsworth et al., Git Re-Basin: Merging Models modulo Permutation Symmetries, ICLR 2023"
_KUMAR = (
    "Kumar et al., Fine-Tuning can Distort Pretrained Features and Underperform Out-of-Distribution, "
    "ICLR 2022"
)
_WORTSMAN = "Wortsman et al., Model soups, ICML 2022"
_LEE = "Lee et al., Overcoming Catastrophic Forgetting by Incremental Moment Matching, NeurIPS 2017"


@dataclass(frozen=True)
class Method:
    """One way from source models to an initialisation of the target network.

    Attributes:
        name: in commands and files.
        title: in tables and figures.
        paper: source, and the equation.
        shared: the shared weights `[P]` from the bank; None leaves them as they were initialised.
        adapt: what is trained before all of the network is: nothing, the task-specific parameters, or these
            together with the mixing logits.
        needs_fisher: the merge uses the bank's Fishers.
        extra_steps: the steps of `adapt` come on top of fine-tuning's, as in the paper; otherwise they are
            taken from its number of steps.
        granularity: groups of the logits, where they are trained.
        aligned: the channels of the sources are first brought into the order of the first one's, see `align`.
        transfer_norms: the norms are shared, too.
        models: the least number of source models.
        normalize: how the Fishers of the bank are scaled before merging, see `Bank.build`.
        l2_transfer: λ in fine-tuning that stays near its start, see `timm_ext.training.ties.Tie`.
        drop_transfer: p of the same.
        logit_pull: λ of the logits' pull to equal ratios, see `timm_ext.transfer.stages.adapt`.
        warm_up: share of the steps of `adapt` in which the logits do not move yet.
        weight_pull: μ of a pull of the weights to the merge, whose ratios are then learned during
            fine-tuning, see `timm_ext.transfer.stages.tune_merged`; 0 learns them before it or not at all.
        combine: the row is no initialisation but the mean, of weights or logits, of the networks that were
            fine-tuned from each of the source models.
        joint: in a study, its last source model is trained on the cases of all source tasks, for the regions
            of its own task (`cases`) or of all (`regions`).
    """

    name: str
    title: str
    paper: str
    shared: Callable[[Bank], Tensor] | None = None
    adapt: Literal["none", "specific", "logits"] = "none"
    needs_fisher: bool = False
    extra_steps: bool = False
    granularity: Granularity = "layer"
    aligned: bool = False
    transfer_norms: bool = False
    models: int = 1
    normalize: Normalization | None = None
    l2_transfer: float = 0.0
    drop_transfer: float = 0.0
    logit_pull: float = 0.0
    warm_up: float = 0.0
    weight_pull: float = 0.0
    combine: Literal["none", "weights", "logits"] = "none"
    joint: Literal["none", "cases", "regions"] = "none"

    @property
    def learns_ratios(self) -> bool:
        """Whether the merge is a function of logits that are trained, before fine-tuning or during it."""
        return self.adapt == "logits" or self.weight_pull > 0


def uniform_merge(bank: Bank, *, with_fisher: bool) -> Tensor:
    """Return the merge `[P]` with equal ratios.

    With Fishers θ*_p = Σ_t F[t,p] θ[t,p] / Σ_t F[t,p] (mode-IMM), without them the mean (mean-IMM).

    Raises:
        InputError: Fishers are wanted and the bank has none.
    """
    if with_fisher and bank.fisher is None:
        raise InputError("mode-imm: expected a bank with Fishers (got one without)")
    whole = torch.tensor([0, bank.layout.numel], device=bank.planes.device)
    equal = torch.zeros(1, len(bank), device=bank.planes.device)
    return fused_merge(bank.theta, bank.fisher if with_fisher else None, equal, whole)


def one_model(bank: Bank, *, index: int) -> Tensor:
    """Return the weights `[P]` of one source model."""
    return bank.theta[index].clone()


mean_imm = partial(uniform_merge, with_fisher=False)
mode_imm = partial(uniform_merge, with_fisher=True)

METHODS: tuple[Method, ...] = (
    Method("scratch", "From scratch", "the network's own initialisation", models=0),
    Method("mean-imm", "Mean-IMM", f"{_LEE}: θ* = Σ θ_t / T", mean_imm),
    Method("mode-imm", "Mode-IMM", f"{_LEE}: θ* = Σ F_t θ_t / Σ F_t", mode_imm, needs_fisher=True),
    Method(
        "mode-imm-normalized",
        "Mode-IMM, Fishers normalised",
        f"{_LEE}: θ* = Σ F_t θ_t / Σ F_t, each tensor's F_t divided by its sum as in {_GEYER}",
        mode_imm,
        needs_fisher=True,
        normalize="tensor",
    ),
    Method(
        "mean-imm-probe",
        "Mean-IMM, linear probe first",
        f"{_LEE}: θ* = Σ θ_t / T; first the task-specific layers alone are trained, as in {_KUMAR}",
        mean_imm,
        adapt="specific",
    ),
    Method(
        "imm-warmup",
        "Mode-IMM + warm-up",
        f"{_LEE}, with the warm-up that T-IMM also has",
        mode_imm,
        adapt="specific",
        needs_fisher=True,
    ),
    Method(
        "t-imm",
        "T-IMM",
        f"{_GEYER}: θ* = Σ α_t F_t θ_t / Σ α_t F_t",
        mode_imm,
        adapt="logits",
        needs_fisher=True,
    ),
    Method(
        "t-imm-extra",
        "T-IMM, adaptation extra",
        f"{_GEYER}: as t-imm, with the adaptation beside the budget of fine-tuning",
        mode_imm,
        adapt="logits",
        needs_fisher=True,
        extra_steps=True,
    ),
    Method(
        "t-imm-norms",
        "T-IMM, norms transferred",
        f"{_GEYER}: as t-imm, with the norms merged, too",
        mode_imm,
        adapt="logits",
        needs_fisher=True,
        transfer_norms=True,
    ),
    Method(
        "t-imm-filter",
        "T-IMM per filter",
        f"{_GEYER}, with ratios α_t for each output channel",
        mode_imm,
        adapt="logits",
        needs_fisher=True,
        granularity="filter",
    ),
    Method(
        "t-imm-kernel",
        "T-IMM per kernel",
        f"{_GEYER}, with ratios α_t for each convolution kernel, as in {_ALMAKKY}",
        mode_imm,
        adapt="logits",
        needs_fisher=True,
        granularity="kernel",
    ),
    Method(
        "t-imm-normalized",
        "T-IMM, Fishers normalised",
        f"{_GEYER}: as t-imm, each tensor's F_t divided by its sum, as the authors' code does",
        mode_imm,
        adapt="logits",
        needs_fisher=True,
        normalize="tensor",
    ),
    Method(
        "t-imm-annealed",
        "T-IMM, ratios learned in fine-tuning",
        f"{_GEYER}: θ = θ*(α) + Δ, all trained together, with μ(t) ‖Δ‖² in the loss, which falls to 0",
        mode_imm,
        needs_fisher=True,
        weight_pull=1e-2,
    ),
    Method(
        "medmerge",
        "MedMerge",
        f"{_ALMAKKY}: θ* = Σ α_t θ_t with learned α_t for each convolution kernel",
        mean_imm,
        adapt="logits",
        granularity="kernel",
    ),
    Method("mean-aligned", "Mean, aligned", f"{_AINSWORTH}: θ* = Σ π_t(θ_t) / T", mean_imm, aligned=True),
    Method(
        "mode-imm-aligned",
        "Mode-IMM, aligned",
        f"{_LEE}: θ* = Σ F_t θ_t / Σ F_t, aligned as in {_AINSWORTH}",
        mode_imm,
        needs_fisher=True,
        aligned=True,
    ),
    Method(
        "medmerge-aligned",
        "MedMerge, aligned",
        f"{_ALMAKKY}: as medmerge, aligned as in {_AINSWORTH}",
        mean_imm,
        adapt="logits",
        granularity="kernel",
        aligned=True,
    ),
    Method(
        "soup",
        "Uniform soup, T trainings",
        f"{_WORTSMAN}: θ* = Σ θ_t / T over the networks fine-tuned from each of the T source models",
        models=2,
        combine="weights",
    ),
    Method(
        "ensemble",
        "Logit ensemble, T trainings, T-fold inference",
        f"{_WORTSMAN}: mean logits of the networks fine-tuned from each of the T source models",
        models=2,
        combine="logits",
    ),
    Method(
        "transfer-joint",
        "Transfer from joint training",
        "the control: one network trained on the cases and regions of all source tasks at once",
        partial(one_model, index=0),
        models=1,
        joint="regions",
    ),
)


TRANSFERS: tuple[Method, ...] = (
    Method("transfer", "Transfer", "all shared weights of one source model"),
    Method(
        "transfer-probe",
        "Transfer, linear probe first",
        f"{_KUMAR}: one source model, of which first the task-specific layers alone are trained",
        adapt="specific",
    ),
    Method(
        "transfer-l2",
        "Transfer, L2-transfer",
        f"{_LEE}: one source model, fine-tuned with λ ‖θ − θ_start‖² in the loss",
        l2_transfer=1e-2,
    ),
    Method(
        "transfer-drop",
        "Transfer, drop-transfer",
        f"{_LEE}: one source model, fine-tuned with output channels put back to θ_start at random",
        drop_transfer=0.5,
    ),
    Method(
        "transfer-all",
        "Transfer, all source cases",
        "the control: one network for one source task, trained on the cases of all source tasks",
        joint="cases",
    ),
)
"""Kinds of transfer from one source model; from the second they are `transfer-2`, `transfer-2-probe`, …"""


def transfer(number: int, kind: Method = TRANSFERS[0]) -> Method:
    """Return a kind of transfer from source model `number`, counted from 1."""
    return replace(
        kind,
        name=kind.name.replace("transfer", f"transfer-{number}"),
        title=kind.title.replace("Transfer", f"Transfer from M{number}"),
        shared=partial(one_model, index=number - 1),
        models=number,
    )


def method_names(models: int) -> tuple[str, ...]:
    """Return the names of all methods for `models` source models: transfers come after scratch, by kind."""
    names = [method.name for method in METHODS]
    transfers = (transfer(number + 1, kind).name for kind in TRANSFERS for number in range(models))
    return (names[0], *transfers, *names[1:])


def get_method(name: str) -> Method:
    """Look a method up by name.

    Raises:
        InputError: there is no such method; the known ones are listed.
    """
    if found := re.fullmatch(r"(transfer)-([1-9][0-9]*)(-[a-z0-9]+)?", name, re.ASCII):
        base, number, ending = found.groups(default="")
        for kind in TRANSFERS:
            if kind.name == base + ending:
                return transfer(int(number), kind)
    for method in METHODS:
        if method.name == name:
            return method
    transfers = [transfer(number, kind).name for kind in TRANSFERS for number in (1, 2)]
    known = ", ".join([METHODS[0].name, *transfers, "…", *(method.name for method in METHODS[1:])])
    raise InputError(f"method: expected one of {known} (got {name!r})")
