from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional


def bernoulli(logits: Tensor, target: Tensor) -> Tensor:
    return -functional.binary_cross_entropy_with_logits(logits, target, reduction="sum")


def loop(model: nn.Module, x: Tensor, y: Tensor, log_likelihood=bernoulli) -> dict[str, Tensor]:
    """The definition: one example at a time, one gradient of all parameters, squared, averaged."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    names, parameters = zip(*model.named_parameters(), strict=True)
    total = [torch.zeros_like(p) for p in parameters]
    for index in range(len(x)):
        part = slice(index, index + 1)
        value = log_likelihood(model(x[part]), y[part]).sum()
        gradients = torch.autograd.grad(value, parameters, allow_unused=True)
        for t, g in zip(total, gradients, strict=True):
            t += 0 if g is None else g**2 / len(x)
    for module, training in modes.items():
        module.training = training
    return dict(zip(names, total, strict=True))


@pytest.fixture
def single_example_loop() -> Callable[..., dict[str, Tensor]]:
    return loop


@pytest.fixture
def assert_same_fisher() -> Callable[..., None]:
    def check(got: dict[str, Tensor], expected: dict[str, Tensor], relative: float = 1e-10) -> None:
        assert list(got) == list(expected)
        for name, value in expected.items():
            error = (got[name].double() - value.double()).abs().max()
            scale = value.double().abs().max()
            # A tensor that is zero but for rounding (a bias in front of a norm) has no scale of its own.
            assert error <= max(relative * scale, 1e-20), f"{name}: error {error:.2e} of {scale:.2e}"

    return check
