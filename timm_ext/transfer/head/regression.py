"""Logistic regression under a Gaussian prior, whose width is chosen by the evidence."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Tensor
from torch.nn import functional

_CONSTANT = 1e-6  # deviation of a column, of its root mean square
_LEAST, _MOST = 1e-9, 1e3  # of λ, for each example
_ROUNDS, _SETTLED = 20, 0.02  # of λ, and the change of its logarithm
_STEPS, _SOLVED = 100, 1e-10  # of Newton's method, and the largest slope for each example
_SHRUNK = 2.0**-30  # of a step


@dataclass(frozen=True)
class Labelled:
    """Labelled examples, each of which stands for some number of them.

    Attributes:
        features: φ `[N, K]`.
        targets: y `[N, R]`, 0 or 1; with softmax one 1 in each row.
        counts: c `[N]`, of how many examples each is one.
        softmax: the outputs exclude each other.
    """

    features: Tensor
    targets: Tensor
    counts: Tensor
    softmax: bool = False


@dataclass(frozen=True)
class Regression:
    """The most probable weights of a logistic regression.

    Attributes:
        weights: W `[K, R]`, float64.
        penalties: λ of each output by itself; with softmax one for all.
        evidence: log p(y | φ) for each example.
    """

    weights: Tensor
    penalties: tuple[float, ...]
    evidence: float


def fit(examples: Labelled) -> Regression:
    """Fit the logits φ W to labels: the mode of W under a Gaussian prior, at the λ of the largest evidence.

        L(W) = Σ_n c_n log p(y_n | φ_n W) − ½ λ ‖W‖²

    is concave and is made largest by Newton's method. Columns of φ count in units of their standard
    deviation; one that is constant takes the part of the intercept, which has no penalty, and any other such
    column gets the weight 0. The log evidence by Laplace's approximation at the mode, with P penalised
    weights, the Hessian H of −L and a flat prior of the intercepts, is

        L(W) + ½ P log λ − ½ log det H

    up to a constant of the sizes, and λ its fixed point λ = (P − λ tr H⁻¹) / ‖W‖², the trace over penalised
    weights. Regions that may overlap are Bernoulli variables, each with a λ of its own; classes of a softmax
    are one multinomial variable, the first intercept of which is 0.

    Source: MacKay, "The evidence framework applied to classification networks", Neural Computation 4, 1992.
    Ranking networks by the evidence of a last layer: You et al., "LogME", arXiv 2102.11005, with a
    linear-Gaussian model in place of the logistic one.

    Args:
        examples: with at least one 0 and one 1 of each output.
    """
    columns = _Columns(examples)
    outputs = examples.targets.double()
    parts = [outputs] if examples.softmax else outputs.split(1, dim=1)
    fits = [_most_probable(_Problem(columns, part, examples)) for part in parts]
    weights = columns.in_their_own_units(torch.cat([mode for mode, _, _ in fits], dim=1))
    evidence = sum(evidence for *_, evidence in fits) / float(columns.counts.sum())
    return Regression(weights, tuple(penalty for _, penalty, _ in fits), evidence)


def _most_probable(problem: "_Problem") -> tuple[Tensor, float, float]:
    """Return the mode at the λ of the largest evidence, that λ, and the log evidence."""
    total = float(problem.counts.sum())
    mode, penalty = problem.at(torch.zeros(problem.shape, dtype=torch.float64)), 1.0
    for _ in range(_ROUNDS):
        mode = problem.solved(mode, penalty)
        evidence, better = problem.evidence(mode, penalty)
        found = mode.weights, penalty, evidence
        better = min(max(better, _LEAST * total), _MOST * total)
        if abs(torch.tensor(better / penalty).log()) < _SETTLED:
            break
        penalty = better
    return found


class _Columns:
    """Varying columns in units of their standard deviation, centred and with ones behind them if they may be.

    They may be where a constant column, other than of zeros, takes the part of the ones.
    """

    def __init__(self, examples: Labelled) -> None:
        values, self.counts = examples.features.double(), examples.counts.double()
        share = self.counts / self.counts.sum()
        mean = share @ values
        deviation = (share @ (values - mean).square()).sqrt()
        size = (share @ values.square()).sqrt()
        self._varying = deviation > _CONSTANT * size
        constant = (~self._varying & (size > 0)).nonzero().flatten().tolist()
        self._constant = constant[:1]
        self._height = mean[self._constant]
        self._mean = (mean if constant else torch.zeros_like(mean))[self._varying]
        self._deviation = deviation[self._varying]
        scaled = (values[:, self._varying] - self._mean) / self._deviation
        ones = scaled.new_ones(len(scaled), len(self._constant))
        self.penalised = scaled.shape[1]
        self.values = torch.cat([scaled, ones], dim=1)

    def in_their_own_units(self, mode: Tensor) -> Tensor:
        """Return W `[K, R]` of weights for these columns."""
        weights = mode.new_zeros(len(self._varying), mode.shape[1])
        varying = mode[: self.penalised] / self._deviation[:, None]
        weights[self._varying] = varying
        weights[self._constant] = (mode[self.penalised :] - self._mean @ varying) / self._height[:, None]
        return weights


@dataclass(frozen=True)
class _Point:
    """Weights W, p(y | φ W), and the part of the Hessian that the examples give, once it is asked for."""

    weights: Tensor
    probabilities: Tensor
    curvature: Callable[[], Tensor]


class _Problem:
    """−L(W) of one variable, with its slope and its curvature; W is `[K', R']`."""

    def __init__(self, columns: _Columns, targets: Tensor, examples: Labelled) -> None:
        self.counts, self._targets, self._softmax = columns.counts, targets, examples.softmax
        self._columns = columns.values
        self.shape = (columns.values.shape[1], targets.shape[1])
        self._penalised = torch.zeros(self.shape, dtype=torch.float64)
        self._penalised[: columns.penalised] = 1
        free = torch.ones(self.shape, dtype=torch.bool)
        free[columns.penalised :, :1] = not self._softmax
        self._free = free.T.flatten()  # output by output, as the Hessian

    def at(self, weights: Tensor) -> "_Point":
        """Return weights with what the labelled examples say there."""
        logits = self._columns @ weights
        probabilities = logits.softmax(dim=1) if self._softmax else logits.sigmoid()
        return _Point(weights, probabilities, cache(partial(self._curvature, probabilities)))

    def value(self, weights: Tensor, penalty: float) -> float:
        """Return −L(W)."""
        logits = self._columns @ weights
        log_share = (
            (self._targets * functional.log_softmax(logits, dim=1))
            if self._softmax
            else self._targets * logits - functional.softplus(logits)
        )
        square = (self._penalised * weights).square().sum()
        return float(0.5 * penalty * square - self.counts @ log_share.sum(dim=1))

    def solved(self, point: "_Point", penalty: float) -> "_Point":
        """Return the mode, by Newton's method from a point on."""
        total = float(self.counts.sum())
        for _ in range(_STEPS):
            rest = self.counts[:, None] * (point.probabilities - self._targets)
            slope = self._columns.T @ rest + penalty * self._penalised * point.weights
            slope = torch.where(self._free.view(slope.T.shape).T, slope, 0)
            if float(slope.abs().max()) < _SOLVED * total:
                break
            step = torch.zeros_like(self._penalised.T).flatten()
            factor = torch.linalg.cholesky(self._hessian(point, penalty))
            inner = slope.T.flatten()[self._free]
            step[self._free] = torch.cholesky_solve(inner[:, None], factor)[:, 0]
            moved = self._descended(point.weights, step.view(slope.T.shape).T, slope, penalty)
            if moved is None:
                break
            point = self.at(moved)
        return point

    def evidence(self, mode: "_Point", penalty: float) -> tuple[float, float]:
        """Return the log evidence at a mode, and the fixed-point iteration's next λ."""
        weights, factor = mode.weights, torch.linalg.cholesky(self._hessian(mode, penalty))
        penalised = self._penalised.T.flatten()[self._free]
        count = float(penalised.sum())
        half = float(factor.diagonal().log().sum())
        found = (
            0.5 * count * float(torch.tensor(penalty).double().log()) - self.value(weights, penalty) - half
        )
        well = count - penalty * float(torch.cholesky_inverse(factor).diagonal() @ penalised)
        square = float((self._penalised * weights).square().sum())
        return found, well / square if square else penalty

    def _descended(self, weights: Tensor, step: Tensor, slope: Tensor, penalty: float) -> Tensor | None:
        """Go against a step, as much of it as makes −L smaller by a share of what the slope promises."""
        value, promised, length = self.value(weights, penalty), float((slope * step).sum()), 1.0
        while length > _SHRUNK:
            moved = weights - length * step
            if self.value(moved, penalty) <= value - 1e-4 * length * promised:
                return moved
            length /= 2
        return None

    def _hessian(self, point: "_Point", penalty: float) -> Tensor:
        """Return the Hessian of −L, of the weights that are not held at 0."""
        whole = point.curvature().clone()
        whole.diagonal().add_(penalty * self._penalised.T.flatten()[self._free])
        return whole

    def _curvature(self, probabilities: Tensor) -> Tensor:
        """Return Σ_n c_n φ_n φ_nᵀ p_a (1[a = b] − p_b) for outputs a, b, without what is held at 0."""
        columns, outputs = self.shape
        blocks = self._columns.new_zeros(outputs, columns, outputs, columns)
        for a in range(outputs):
            for b in range(a, outputs):
                curvature = self.counts * probabilities[:, a] * (float(a == b) - probabilities[:, b])
                block = (self._columns * curvature[:, None]).T @ self._columns
                blocks[a, :, b], blocks[b, :, a] = block, block.T
        whole = blocks.view(outputs * columns, outputs * columns)
        return whole[self._free][:, self._free]
