import pytest
import torch
from torch import Tensor, nn

from timm_ext.errors import InputError
from timm_ext.merging.alignment import align
from timm_ext.merging.barrier import LossPath, loss_along_merge


def network(hidden: list[float], leave: list[float]) -> nn.Module:
    """f(x) = Σ leave · relu(hidden · x)."""
    net = nn.Sequential(nn.Linear(1, 2, bias=False), nn.ReLU(), nn.Linear(2, 1, bias=False))
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor(hidden)[:, None])
        net[2].weight.copy_(torch.tensor(leave)[None])
    return net


ONE, TWO = network([1.0, -1.0], [1.0, 1.0]), network([-1.0, 1.0], [1.0, 1.0])  # both are |x|
X = torch.tensor([[-1.0], [1.0]])


def error(model: nn.Module) -> float:
    assert not torch.is_grad_enabled()
    return (model(X) - X.abs()).square().mean().item()


def test_barrier_by_hand() -> None:
    path = loss_along_merge(ONE, TWO, error, points=5)
    assert path.points == (0, 0.25, 0.5, 0.75, 1)
    # Hidden weights are ±(1 − 2λ), so that f(x) = |1 − 2λ| |x|.
    assert path.losses == (0, 0.25, 1, 0.25, 0)
    assert path.barrier == 1


def test_alignment_removes_a_barrier_of_order() -> None:
    aligned = align(TWO, ONE, example=torch.zeros(1, 1)).model
    path = loss_along_merge(ONE, aligned, error)
    assert path.losses == (0,) * 11
    assert path.barrier == 0


def test_barrier_is_above_the_mean_of_the_ends() -> None:
    assert LossPath((0, 0.5, 1), (1.0, 4.0, 3.0)).barrier == 2
    assert LossPath((0, 0.5, 1), (1.0, 0.5, 3.0)).barrier == 1


def test_only_named_parameters_move() -> None:
    def weights(model: nn.Module) -> float:
        seen.append([p.flatten().tolist() for p in model.parameters()])
        return 0.0

    seen: list[list[list[float]]] = []
    loss_along_merge(ONE, network([3.0, 3.0], [5.0, 5.0]), weights, points=3, names=["2.weight"])
    assert seen == [[[1, -1], [value, value]] for value in (1, 3, 5)]
    assert ONE[2].weight.tolist() == [[1, 1]]


def test_running_statistics_move_along() -> None:
    def mean(model: nn.Module) -> float:
        return model.running_mean.item()

    one, two = nn.BatchNorm1d(1), nn.BatchNorm1d(1)
    two.running_mean.fill_(8)
    assert loss_along_merge(one, two, mean, points=3).losses == (0, 4, 8)
    assert loss_along_merge(one, two, mean, points=3, names=["weight"]).losses == (0, 0, 0)


def test_wrong_arguments_are_refused() -> None:
    def loss(model: nn.Module) -> Tensor:
        raise AssertionError

    with pytest.raises(InputError, match=r"points: expected at least 3, .* \(got 2\)"):
        loss_along_merge(ONE, TWO, loss, points=2)
    with pytest.raises(InputError, match=r"names: expected parameters of the network \(got head\)"):
        loss_along_merge(ONE, TWO, loss, names=["head"])
    with pytest.raises(InputError, match=r"second: 0.weight: expected \[2, 1\] as in first \(got \[3, 1\]\)"):
        loss_along_merge(ONE, nn.Sequential(nn.Linear(1, 3, bias=False)), loss)
