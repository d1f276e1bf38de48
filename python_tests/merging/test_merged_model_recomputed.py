"""Merged models whose networks compute activations anew in the backward (`torch.utils.checkpoint`)."""

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from timm_ext.layout import Layout
from timm_ext.merging import Bank, MergedModel
from timm_ext.parameters import split_parameters

pytestmark = pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")

MODES = [None, False, True]  # no checkpoints, non-reentrant, reentrant


class Net(nn.Module):
    """Two checkpointed parts, one within the other's, and a tied weight."""

    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        self.reentrant = reentrant
        self.a, self.b, self.c = (nn.Conv3d(n, 4, 3, padding=1) for n in (1, 4, 4))
        self.norm = nn.BatchNorm3d(4)
        self.d = nn.Conv3d(4, 4, 3, padding=1)
        self.d.weight = self.c.weight
        self.chain = nn.Sequential(*(nn.Conv3d(4, 4, 1) for _ in range(4)))
        self.head = nn.Conv3d(4, 2, 1)

    def again(self, function, x: Tensor) -> Tensor:
        return (
            function(x) if self.reentrant is None else checkpoint(function, x, use_reentrant=self.reentrant)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        x = self.again(lambda y: self.again(lambda z: self.c(z).tanh(), self.b(y).tanh()), x)
        x = self.again(lambda y: self.norm(self.d(y)).tanh(), x)
        if self.reentrant is None:
            return self.head(self.chain(x))
        return self.head(checkpoint_sequential(self.chain, 2, x, use_reentrant=self.reentrant))


def network(seed: int, reentrant: bool | None = None) -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Net(reentrant)


def merged_of(
    reentrant: bool | None, *, with_offset: bool = False, dtype: torch.dtype = torch.float32
) -> MergedModel:
    target = network(9, reentrant)
    layout = Layout.from_model(target, split_parameters(target, heads=["head."], transfer_norms=True).shared)
    bank = Bank.build({f"M{t}": network(t).state_dict() for t in range(2)}, None, layout, dtype=dtype)
    logits = torch.tensor([0.5, -0.3])
    return MergedModel(target, bank, initial_logits=logits, with_offset=with_offset).train()


def images(seed: int = 1) -> Tensor:
    return torch.randn(2, 1, 4, 4, 4, generator=torch.Generator().manual_seed(seed))


def gradients(model: MergedModel) -> dict[str, Tensor]:
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-7)
    assert expected["logits"].abs().max() > 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("with_offset", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradients_are_those_without_checkpoints(
    reentrant: bool, with_offset: bool, dtype: torch.dtype
) -> None:
    found = []
    for mode in (None, reentrant):
        model = merged_of(mode, with_offset=with_offset, dtype=dtype)
        for _ in range(2):  # accumulated over two steps
            model(images()).square().mean().backward()
        found.append(gradients(model))
    assert_same(found[1], found[0])


@pytest.mark.parametrize("reentrant", [False, True])
def test_several_forwards_before_a_backward(reentrant: bool) -> None:
    found = []
    for mode in (None, reentrant):
        model = merged_of(mode)
        (model(images(1)) - model(images(2))).square().mean().backward()
        found.append(gradients(model))
    assert_same(found[1], found[0])


@pytest.mark.parametrize("reentrant", [False, True])
def test_frozen_logits(reentrant: bool) -> None:
    found = []
    for mode in (None, reentrant):
        model = merged_of(mode)
        model.logits.requires_grad_(False)
        model(images().requires_grad_()).square().mean().backward()
        assert model.logits.grad is None
        found.append(model.network.head.weight.grad.clone())
    torch.testing.assert_close(found[1], found[0])


@pytest.mark.parametrize("reentrant", MODES)
def test_what_is_left_in_the_network_is_no_parameter_and_no_state(reentrant: bool | None) -> None:
    model = merged_of(reentrant)
    names, states = [n for n, _ in model.named_parameters()], list(model.state_dict())
    loss = model(images()).square().mean()
    assert [n for n, _ in model.named_parameters()] == names
    assert list(model.state_dict()) == states
    twin, again = copy.deepcopy(model), model.fold()
    loss.backward()
    assert torch.equal(twin.fold().b.weight, again.b.weight)
    assert model.logits.grad is not None
    assert pickle.loads(pickle.dumps(model)).merge().equal(model.merge())
    with torch.no_grad():
        model.logits += torch.tensor([1.0, -1.0])
        expected = model.fold().eval()(images())
        assert torch.equal(model.eval()(images()), expected)
    model(images())
    assert model.double()(images().double()).dtype == torch.float64


@pytest.mark.parametrize("reentrant", [None, False])
def test_second_derivatives(reentrant: bool | None) -> None:
    model = merged_of(reentrant)
    (first,) = torch.autograd.grad(model(images()).square().mean(), model.logits, create_graph=True)
    first.square().sum().backward()
    assert model.logits.grad.abs().max() > 0
