"""Arms: the ways from source models to a fine-tuned network that are compared, each a row of one table."""

from dataclasses import dataclass, field, replace

from timm_ext.errors import InputError
from timm_ext.groups import Granularity
from timm_ext.merging.merge import (
    AINSWORTH,
    GEYER,
    LEE,
    MEAN,
    MEAN_ALIGNED,
    MODE,
    MODE_NORMALIZED,
    Merge,
    look_up,
    merges,
    transfer,
)

ALMAKKY = (
    "Almakky et al., MedMerge: Merging Models for Effective Transfer Learning to Medical Imaging Tasks, "
    "arXiv 2403.11646, 2024"
)
KUMAR = (
    "Kumar et al., Fine-Tuning can Distort Pretrained Features and Underperform Out-of-Distribution, "
    "ICLR 2022"
)
KIRKPATRICK = "Kirkpatrick et al., Overcoming Catastrophic Forgetting in Neural Networks, PNAS 2017"
LI = "Li et al., Explicit Inductive Bias for Transfer Learning with Convolutional Networks, ICML 2018"
YOU = "You et al., LogME: Practical Assessment of Pre-trained Models for Transfer Learning, ICML 2021"


@dataclass(frozen=True)
class Adaptation:
    """What an arm trains before all of the network is.

    Attributes:
        ratios: the mixing logits together with the task-specific parameters; otherwise these alone.
        granularity: groups of the logits.
        extra_steps: its steps come on top of fine-tuning's, as in the paper; otherwise they are taken from
            its number of steps.
        logit_pull: λ of the logits' pull to equal ratios, see `timm_ext.transfer.adapt.adapt`.
        warm_up: share of the steps in which the logits do not move yet.
    """

    ratios: bool = True
    granularity: Granularity = "layer"
    extra_steps: bool = False
    logit_pull: float = 0.0
    warm_up: float = 0.0


@dataclass(frozen=True)
class FineTuning:
    """How the whole network is trained.

    Attributes:
        l2_transfer: λ of L2-transfer, see `timm_ext.training.ties.Tie`.
        drop_transfer: p of drop-transfer, see there.
        weight_pull: μ of a pull of the weights to the merge, whose ratios are then learned during
            fine-tuning, see `timm_ext.transfer.tune.tune_merged`; 0 learns them before it or not at all.
        prior_cases: N₀ of a pull to the start by the precision of the source tasks, see
            `timm_ext.transfer.posterior.prior_precision`; 0 is without.
        isotropic: that pull is the same for all weights, of the same trace.
    """

    l2_transfer: float = 0.0
    drop_transfer: float = 0.0
    weight_pull: float = 0.0
    prior_cases: float = 0.0
    isotropic: bool = False

    def ties(self) -> dict[str, float]:
        """Return what is tied to the start, as fields of `TrainSettings`."""
        ties = {"l2_transfer": self.l2_transfer, "drop_transfer": self.drop_transfer}
        return {name: value for name, value in ties.items() if value}


@dataclass(frozen=True)
class Arm:
    """A merge, what is trained before all of the network is, and how all of it is fine-tuned.

    Attributes:
        name: in commands and files.
        title: in tables and figures.
        paper: source, and the equation.
        merge: of the source models. Where ratios are learned, equal ratios are what they start from, so
            that it must be one of those (`Merge.uniform`): all sources, with or without Fishers.
        adaptation: None goes from the merge to fine-tuning.
        tuning: of the whole network.
        by_evidence: the merge takes the first source model until cases are there; then that one is taken
            whose heads, fitted to them, have the highest evidence, with these heads
            (`timm_ext.transfer.settle.settled`).

    Raises:
        InputError: ratios are to be learned over another merge.
    """

    name: str
    title: str
    paper: str
    merge: Merge
    adaptation: Adaptation | None = None
    tuning: FineTuning = field(default_factory=FineTuning)
    by_evidence: bool = False

    def __post_init__(self) -> None:
        if self.learns_ratios and not self.merge.uniform:
            raise InputError(
                f"{self.name}: expected a merge of all sources with equal ratios, such as mean-imm or "
                f"mode-imm, where ratios are learned (got {self.merge.name})"
            )

    @classmethod
    def of(cls, merge: Merge) -> "Arm":
        """Return the arm of a merge that is fine-tuned at once, under the merge's name."""
        return cls(merge.name, merge.title, merge.paper, merge)

    @property
    def learns(self) -> bool:
        """Whether data make the initialisation: a choice, an adaptation, or ratios fine-tuning learns."""
        return self.by_evidence or self.trains

    @property
    def trains(self) -> bool:
        """Whether steps are taken for the initialisation."""
        return self.adaptation is not None or self.tunes

    @property
    def tunes(self) -> bool:
        """Whether fine-tuning needs what the merge is made of, so that it is done at once with it."""
        return self.tuning.weight_pull > 0 or self.tuning.prior_cases > 0

    @property
    def learns_ratios(self) -> bool:
        """Whether the merge is a function of logits that are trained, before fine-tuning or during it."""
        return self.tuning.weight_pull > 0 or (self.adaptation is not None and self.adaptation.ratios)


WARM_UP = Adaptation(ratios=False)
RATIOS = Adaptation()
RATIOS_BY_KERNEL = Adaptation(granularity="kernel")

ARMS: tuple[Arm, ...] = (
    Arm(
        "best-by-evidence",
        "Best source by evidence, fitted head",
        f"{YOU}: the source t of the largest evidence log p(Y | φ_t(X)), logistic heads",
        transfer(1),
        by_evidence=True,
    ),
    Arm(
        "mean-imm-probe",
        "Mean-IMM, linear probe first",
        f"{LEE}: θ* = Σ θ_t / T; first the task-specific layers alone are trained, as in {KUMAR}",
        MEAN,
        WARM_UP,
    ),
    Arm(
        "imm-warmup",
        "Mode-IMM + warm-up",
        f"{LEE}, with the warm-up that T-IMM also has",
        MODE,
        WARM_UP,
    ),
    Arm("t-imm", "T-IMM", f"{GEYER}: θ* = Σ α_t F_t θ_t / Σ α_t F_t", MODE, RATIOS),
    Arm(
        "t-imm-extra",
        "T-IMM, adaptation extra",
        f"{GEYER}: as t-imm, with the adaptation beside the budget of fine-tuning",
        MODE,
        Adaptation(extra_steps=True),
    ),
    Arm(
        "t-imm-norms",
        "T-IMM, norms transferred",
        f"{GEYER}: as t-imm, with the norms merged, too",
        replace(MODE, transfer_norms=True),
        RATIOS,
    ),
    Arm(
        "t-imm-filter",
        "T-IMM per filter",
        f"{GEYER}, with ratios α_t for each output channel",
        MODE,
        Adaptation(granularity="filter"),
    ),
    Arm(
        "t-imm-kernel",
        "T-IMM per kernel",
        f"{GEYER}, with ratios α_t for each convolution kernel, as in {ALMAKKY}",
        MODE,
        RATIOS_BY_KERNEL,
    ),
    Arm(
        "t-imm-normalized",
        "T-IMM, Fishers normalised",
        f"{GEYER}: as t-imm, each tensor's F_t divided by its sum, as the authors' code does",
        MODE_NORMALIZED,
        RATIOS,
    ),
    Arm(
        "t-imm-annealed",
        "T-IMM, ratios learned in fine-tuning",
        f"{GEYER}: θ = θ*(α) + Δ, all trained together, with μ(t) ‖Δ‖² in the loss, which falls to 0",
        MODE,
        tuning=FineTuning(weight_pull=1e-2),
    ),
    Arm(
        "mode-imm-posterior",
        "Mode-IMM, posterior as prior",
        f"{LEE}; fine-tuned with N₀/2N ‖Λ^½ (θ − θ*)‖² in the loss, Λ = Σ α_t n_t (F_t + ε), N₀ = 4",
        MODE,
        tuning=FineTuning(prior_cases=4.0),
    ),
    Arm(
        "mode-imm-isotropic",
        "Mode-IMM, isotropic prior",
        f"{LEE}; as mode-imm-posterior with Λ = 1 of the same trace (L2-SP, {LI})",
        MODE,
        tuning=FineTuning(prior_cases=4.0, isotropic=True),
    ),
    Arm(
        "medmerge",
        "MedMerge",
        f"{ALMAKKY}: θ* = Σ α_t θ_t with learned α_t for each convolution kernel",
        MEAN,
        RATIOS_BY_KERNEL,
    ),
    Arm(
        "medmerge-aligned",
        "MedMerge, aligned",
        f"{ALMAKKY}: as medmerge, aligned as in {AINSWORTH}",
        MEAN_ALIGNED,
        RATIOS_BY_KERNEL,
    ),
)
"""All arms that are more than a merge, but those of `transfers`."""


def transfers(number: int) -> tuple[Arm, ...]:
    """Return the arms that do more than start from source model `number` alone, counted from 1."""
    one = transfer(number)
    return (
        Arm(
            f"{one.name}-probe",
            f"{one.title}, linear probe first",
            f"{KUMAR}: one source model, of which first the task-specific layers alone are trained",
            one,
            WARM_UP,
        ),
        Arm(
            f"{one.name}-l2",
            f"{one.title}, L2-transfer",
            f"{LEE}: one source model, fine-tuned with λ ‖θ − θ_start‖² in the loss",
            one,
            tuning=FineTuning(l2_transfer=1e-2),
        ),
        Arm(
            f"{one.name}-drop",
            f"{one.title}, drop-transfer",
            f"{LEE}: one source model, fine-tuned with output channels put back to θ_start at random",
            one,
            tuning=FineTuning(drop_transfer=0.5),
        ),
        Arm(
            f"{one.name}-ewc",
            f"{one.title}, EWC transfer",
            f"{KIRKPATRICK}: one source model; N₀/2N ‖Λ^½ (θ − θ_start)‖² in the loss, Λ ∝ F_t + ε, N₀ = 4",
            replace(one, needs_fisher=True),
            tuning=FineTuning(prior_cases=4.0),
        ),
    )


def arms(*numbers: int) -> dict[str, Arm]:
    """Return the arms by name, each merge alone first, with the transfers from models of these numbers."""
    kinds = zip(*map(transfers, numbers), strict=True)
    rows = (*map(Arm.of, merges(*numbers).values()), *(arm for kind in kinds for arm in kind), *ARMS)
    return {arm.name: arm for arm in rows}


def beyond(*numbers: int) -> dict[str, str]:
    """Return what only a study makes (`timm_ext.study.arms`), by name, and what comes near it by hand."""
    joint = "starts from a network trained on all source cases; give it to transfer-1"
    combined = "combines fine-tuned networks; give them to merge --ratios"
    names = {f"{transfer(number).name}-all": joint for number in numbers}
    return {**names, "soup": combined, "ensemble": combined, "transfer-joint": joint}


def get_arm(name: str) -> Arm:
    """Look an arm up by name.

    Raises:
        InputError: there is no such arm, or only a study has it; the known ones are listed, or what to do.
    """
    row = look_up(name, _known)
    if isinstance(row, str):
        raise InputError(f"method: {name} {row}")
    return row


def _known(*numbers: int) -> dict[str, Arm | str]:
    return {**arms(*numbers), **beyond(*numbers)}
