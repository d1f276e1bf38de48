"""The posterior of the source tasks as the prior of fine-tuning: how firmly each weight is held."""

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor, nn

from timm_ext.errors import InputError
from timm_ext.layers import layers_on
from timm_ext.merging import Bank
from timm_ext.modes import evaluating
from timm_ext.parameters import named_parameters
from timm_ext.training.device import launch, reproducible
from timm_ext.training.examples import task_of
from timm_ext.training.objective import loss_of
from timm_ext.transfer.arms import Arm
from timm_ext.transfer.session import Session

_FLOOR = 1e-2  # ε as a share of the mean of F_t: every weight is held a little, whatever the scale of F_t


def source_precision(
    arm: Arm, bank: Bank, counts: Sequence[int], zero: Collection[str] = ()
) -> dict[str, Tensor]:
    """Return the precision of the shared weights by the source tasks, up to a factor.

        Λ = Σ_t α_t n_t (F_t + ε_t),    ε_t = 1 % of the mean of F_t

    with n_t cases of source t and the ratios α_t of the arm's merge: equal, or 1 for its only source. An
    isotropic arm has Λ = 1 in its place.

    Source: Kirkpatrick et al., Overcoming Catastrophic Forgetting in Neural Networks, PNAS 2017 (one source);
    the sum over sources is the precision of the merge of mode-IMM, Lee et al., NeurIPS 2017.

    Args:
        arm: with `FineTuning.prior_cases`.
        bank: of the sources, with Fishers.
        counts: n_t.
        zero: parameters whose Fishers are zero by structure; the bank has F = 1 there.

    Returns:
        By name, of the parameters' shapes, on the bank's device.

    Raises:
        InputError: the Fishers of all sources are zero.
    """
    assert bank.fisher is not None
    if arm.tuning.isotropic:
        return bank.layout.split(torch.ones_like(bank.theta[0], dtype=torch.float32))
    chosen = range(len(bank)) if (one := arm.merge.source) is None else [one]
    total = torch.zeros(bank.layout.numel, device=bank.matrices.device)
    for place in chosen:
        fisher = bank.fisher[place].float().clone()
        for name, part in bank.layout.split(fisher).items():
            if name in zero:
                part.zero_()
        total += counts[place] * (fisher + _FLOOR * fisher.mean()) / len(chosen)
    if not bool(total.sum() > 0):
        raise InputError(f"{arm.name}: expected Fishers above zero somewhere (got none)")
    return bank.layout.split(total)


def loss_trace(model: nn.Module, names: Collection[str], session: Session) -> float:
    """Return the trace of the target's Fisher over some parameters, 1/N Σ_n Σ_p (∂ℓ_n / ∂θ_p)².

    ℓ_n is the training's loss of case n alone, which stands for −log p(y_n | x_n), with its true labels (the
    empirical Fisher), of the samples of the first epoch and the network as it is validated.

    Args:
        model: plain; it is not changed.
        names: of its parameters.
        session: of the training.
    """
    settings, examples = session.settings, session.data.train
    device, loss = launch(settings).device, loss_of(task_of(examples))
    model.to(device)
    every, total = named_parameters(model), 0.0
    parameters = [every[name] for name in names]
    with reproducible(device), evaluating(model), layers_on(device, settings.fast_layers):
        for index in range(len(examples)):
            sample = examples.sample(index, 0)
            image, target = (sample[part][None].to(device) for part in ("image", "target"))
            grads = torch.autograd.grad(loss(model(image), target), parameters, allow_unused=True)
            total += sum(float(grad.double().square().sum()) for grad in grads if grad is not None)
    return total / len(examples)


def prior_precision(
    precision: Mapping[str, Tensor], prior_cases: float, model: nn.Module, session: Session
) -> dict[str, Tensor]:
    """Return the precision that holds the weights in fine-tuning, (N₀ / N) (tr F / tr Λ) Λ.

    The trace of Λ is matched to that of the target's Fisher F (`loss_trace`), in whose units the loss is: the
    prior weighs as much as N₀ cases beside the N that are trained on.

    Args:
        precision: Λ by name, see `source_precision`.
        prior_cases: N₀.
        model: plain, as fine-tuning starts from it.
        session: of the training.
    """
    trace = sum(float(value.double().sum()) for value in precision.values())
    share = prior_cases / len(session.data.train)
    scale = share * loss_trace(model, precision.keys(), session) / trace
    return {name: scale * value for name, value in precision.items()}
