"""Ways to get Σ_b (∂ log p(y_b | x_b) / ∂θ)² of a batch, and the check that all do the same work."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.networks import NETWORKS, draw
from timm_ext.fisher import FisherAccumulator
from timm_ext.fisher.likelihoods import summed_logits

Squares = dict[str, Tensor]
ERROR_BOUND = 0.05  # of the norm of each layer's F: float32 differs so much through LeakyReLU's kink


@dataclass(frozen=True)
class Problem:
    """A network, a batch and its labels."""

    model: nn.Module
    images: Tensor
    labels: Tensor

    def copy(self) -> "Problem":
        """The same numbers in a network of its own, which a rival may change."""
        model = copy.deepcopy(self.model)
        for module in model.modules():  # hooks on modules do not bear changes in place
            if hasattr(module, "inplace"):
                module.inplace = False
        return Problem(model, self.images, self.labels)


def make_problem(network: str, edge: int, batch: int, device: str = "cpu") -> Problem:
    """Draw a batch for a network.

    Args:
        network: its name in `benchmarks.networks`.
        edge: of the cubic images, 4 × edge³.
        batch: examples B.
        device: of all tensors.
    """
    images, labels = draw(batch, edge, device=device)
    return Problem(NETWORKS[network]().eval().to(device), images, labels.float())


def log_likelihood(output: Any, labels: Tensor) -> Tensor:
    """Σ of the Bernoulli log-likelihoods; deep-supervision outputs are added."""
    return -functional.binary_cross_entropy_with_logits(summed_logits(output), labels, reduction="sum")


def plain(p: Problem) -> Callable[[], Any]:
    """The unit: one batched forward and backward."""

    def step() -> None:
        p.model.zero_grad(set_to_none=True)
        log_likelihood(p.model(p.images), p.labels).backward()  # type: ignore[no-untyped-call]

    return step


def ours(p: Problem) -> Callable[[], Squares]:
    """`FisherAccumulator` with micro-batches as it chooses them."""
    return _Updates(p, "auto")


def ours_one_by_one(p: Problem) -> Callable[[], Squares]:
    """`FisherAccumulator` with one example at a time."""
    return _Updates(p, 1)


class _Updates:
    """Updates of one accumulator with the same batch under new names, as over a data set."""

    def __init__(self, p: Problem, micro_batch: int | Literal["auto"]) -> None:
        self._problem, self._calls = p, 0
        self._accumulator = FisherAccumulator(
            p.model, likelihood="bernoulli", labels="true", micro_batch=micro_batch
        )

    def __call__(self) -> Squares:
        p, accumulator = self._problem, self._accumulator
        self._calls += 1
        with accumulator:
            accumulator.update(p.images, p.labels, [f"{self._calls}.{i}" for i in range(len(p.images))])
        if self._calls > 1:
            return {}
        fisher = accumulator.result()
        return {name: tensor * fisher.count for name, tensor in fisher.tensors.items()}


def loop(p: Problem) -> Callable[[], Squares]:
    """One forward and backward for each example."""
    parameters = dict(p.model.named_parameters())

    def step() -> Squares:
        total = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
        for image, labels in zip(p.images, p.labels, strict=True):
            value = log_likelihood(p.model(image[None]), labels[None])
            gradients = torch.autograd.grad(value, list(parameters.values()), allow_unused=True)
            for name, gradient in zip(total, gradients, strict=True):
                if gradient is not None:  # of a head that the output does not depend on
                    total[name] += gradient.square()
        return total

    return step


def vmap(p: Problem) -> Callable[[], Squares]:
    """`torch.func.vmap(grad)`, which holds B gradients of every parameter."""
    parameters = {name: parameter.detach() for name, parameter in p.model.named_parameters()}

    def value(parameters: Squares, image: Tensor, labels: Tensor) -> Tensor:
        # A module under two names counts as tied, and would not be put back.
        logits = torch.func.functional_call(p.model, parameters, (image[None],), tie_weights=False)
        return log_likelihood(logits, labels[None])

    gradients = torch.func.vmap(torch.func.grad(value), in_dims=(None, 0, 0))
    return lambda: {n: g.square().sum(0) for n, g in gradients(parameters, p.images, p.labels).items()}


def opacus(p: Problem) -> Callable[[], Squares]:
    """Opacus' `GradSampleModule`, which holds B gradients of every parameter."""
    from opacus import GradSampleModule

    model = p.copy().model
    for part in model.modules():
        if isinstance(part, nn.Dropout3d):
            part.p = 0.0
    module = GradSampleModule(model.train(), loss_reduction="sum")  # its hooks see nothing in eval mode

    def step() -> Squares:
        log_likelihood(module(p.images), p.labels).backward()  # type: ignore[no-untyped-call]
        total = {}
        for name, parameter in module._module.named_parameters():
            total[name] = parameter.grad_sample.square().sum(0)
            parameter.grad_sample = parameter.grad = None
        return total

    return step


def backpack(p: Problem) -> Callable[[], Squares]:
    """BackPACK's `SumGradSquared`, on the layers that it knows: convolutions."""
    from backpack import backpack, extend
    from backpack.extensions import SumGradSquared

    known = (nn.Conv3d, nn.ConvTranspose3d, nn.Linear)
    model = p.copy().model
    for module in model.modules():
        if isinstance(module, known):
            extend(module)
    covered = {
        f"{path}.{n}"
        for path, m in model.named_modules()
        if isinstance(m, known)
        for n, _ in m.named_parameters()
    }
    value = extend(nn.BCEWithLogitsLoss(reduction="sum"))

    def step() -> Squares:
        model.zero_grad(set_to_none=True)
        with backpack(SumGradSquared()):
            (-value(model(p.images), p.labels)).backward()
        return {n: q.sum_grad_squared for n, q in model.named_parameters() if n in covered}

    return step


RIVALS: dict[str, Callable[[Problem], Callable[[], Any]]] = {
    "ours": ours,
    "ours one by one": ours_one_by_one,
    "loop": loop,
    "vmap": vmap,
    "opacus": opacus,
    "backpack": backpack,
}


def errors(found: Squares, expected: Squares) -> float:
    """Largest error of a layer's F in units of its norm; what cancels to rounding noise does not count."""
    largest = max(float(tensor.norm()) for tensor in expected.values())
    return max(
        float((tensor - expected[name]).norm() / expected[name].norm())
        for name, tensor in found.items()
        if float(expected[name].norm()) > 1e-9 * largest
    )


@contextmanager
def available(name: str, network: str) -> Iterator[None]:
    """Skip a rival that is not installed or does not take a network, with a word about it; never ours."""
    try:
        yield
    except (ImportError, RuntimeError, NotImplementedError, ValueError, AttributeError, KeyError) as error:
        if name.startswith("ours"):
            raise
        print(f"benchmarks.fisher: {network}: {name} is left out: {str(error).splitlines()[0]}", flush=True)
