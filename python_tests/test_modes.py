"""Whatever evaluates a model gives every module its own mode back: a frozen batch norm stays frozen."""

import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from timm_ext import FisherAccumulator
from timm_ext.inference import predict_probabilities
from timm_ext.merging import loss_along_merge
from timm_ext.modes import evaluating
from timm_ext.networks import trace_channels
from timm_ext.training.objective import soft_dice_loss
from timm_ext.training.settings import TrainSettings
from timm_ext.training.validation import validate


def network() -> nn.Module:
    """In training but for a frozen batch norm, within which one module is in training nevertheless."""
    frozen = nn.BatchNorm3d(2).eval()
    frozen.add_module("inner", nn.Dropout().train())
    inner = nn.Sequential(nn.Dropout3d(), nn.InstanceNorm3d(2)).eval()
    inner[1].train()
    return nn.Sequential(nn.Conv3d(1, 2, 3, padding=1), frozen, inner, nn.Conv3d(2, 1, 1))


def modes(model: nn.Module) -> list[tuple[str, bool]]:
    return [(name, module.training) for name, module in model.named_modules()]


class OneCase:
    def __len__(self) -> int:
        return 1

    def sample(self, index: int, epoch: int) -> dict[str, object]:
        return {"id": "a", "image": torch.randn(1, 4, 4, 4), "target": torch.ones(1, 4, 4, 4)}


def _validate(model: nn.Module) -> None:
    settings = TrainSettings(accelerator="cpu", tensorboard=False)
    validate(Fabric(accelerator="cpu", devices=1), model, OneCase(), 1, soft_dice_loss(), settings)


def _fisher(model: nn.Module) -> None:
    with FisherAccumulator(model) as accumulator:
        accumulator.update(torch.randn(1, 1, 4, 4, 4), None, ["a"])


WAYS: dict[str, Callable[[nn.Module], object]] = {
    "prediction": lambda model: predict_probabilities(model, torch.randn(1, 4, 4, 4)),
    "validation": _validate,
    "Fisher": _fisher,
    "tracing": lambda model: trace_channels(model, torch.randn(1, 1, 4, 4, 4)),
}


@pytest.mark.parametrize("way", WAYS)
def test_every_module_keeps_its_mode(way: str) -> None:
    model = network()
    before, statistics = modes(model), model[1].running_mean.clone()
    WAYS[way](model)
    assert modes(model) == before
    assert torch.equal(model[1].running_mean, statistics)


def test_every_module_keeps_its_mode_when_the_block_fails() -> None:
    model = network()
    before = modes(model)

    def fail() -> None:
        with evaluating(model):
            assert not any(module.training for module in model.modules())
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert modes(model) == before


def test_the_loss_along_a_merge_is_that_of_networks_in_eval_mode() -> None:
    one, other = network(), network()
    x = torch.randn(2, 1, 4, 4, 4)
    with torch.no_grad():
        one[1].running_mean += 1
    seen: list[float] = []

    def loss(model: nn.Module) -> float:
        assert not model.training
        seen.append(float(model(x).mean()))
        return seen[-1]

    before = modes(one)
    assert loss_along_merge(one, other, loss).losses == loss_along_merge(one, other, loss).losses
    assert modes(one) == before


class _Merging(nn.Module):
    """Folds a second weight into the first in eval mode, as low-rank adapters do."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.extra, self.folded = 1.0, 2.0, False

    def train(self, mode: bool = True) -> "_Merging":
        if self.folded == mode:
            self.weight += -self.extra if mode else self.extra
            self.folded = not mode
        super().train(mode)
        return self

    def forward(self, x: Tensor) -> Tensor:
        return x * (self.weight if self.folded else self.weight + self.extra)


def test_modules_that_do_more_than_set_a_flag() -> None:
    model = nn.Sequential(_Merging(), nn.Sequential(_Merging(), nn.Dropout()).eval())
    weights = [module.weight for module in model.modules() if isinstance(module, _Merging)]
    with evaluating(model):
        assert model[0].folded
    assert [m.weight for m in model.modules() if isinstance(m, _Merging)] == weights == [1.0, 3.0]
    assert (model[0].folded, model[1][0].folded) == (False, True)


def wrapped() -> Iterator[tuple[str, Callable[[nn.Module], nn.Module]]]:
    yield "compiled", lambda model: torch.compile(model, backend="eager")
    yield "scripted", torch.jit.script
    yield "traced", lambda model: torch.jit.trace(model, torch.zeros(1, 1, 4, 4, 4), check_trace=False)


@pytest.mark.parametrize(("name", "wrap"), wrapped(), ids=lambda value: value if type(value) is str else "")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_modes_of_wrapped_models(name: str, wrap: Callable[[nn.Module], nn.Module]) -> None:
    model = wrap(nn.Sequential(nn.Conv3d(1, 2, 1), nn.BatchNorm3d(2), nn.Dropout()))
    model.train()
    next(module for path, module in model.named_modules() if path.endswith("1")).eval()
    before = modes(model)
    assert {training for _, training in before} == {True, False}
    with evaluating(model):
        assert not any(training for _, training in modes(model))
    assert modes(model) == before


def test_a_frozen_script_has_no_mode() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = torch.jit.freeze(torch.jit.script(nn.Sequential(nn.Conv3d(1, 1, 1)).eval()))
    image = torch.randn(1, 3, 3, 3)
    torch.testing.assert_close(
        predict_probabilities(model, image), model(image[None])[0].sigmoid(), rtol=0, atol=0
    )
