import pytest
import torch
from torch import nn

from timm_ext.errors import InputError
from timm_ext.fisher import FisherAccumulator


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.spare = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x):
        return self.b(self.a(x).tanh())


def update(model, **options):
    accumulator = FisherAccumulator(model, **options)
    with accumulator:
        accumulator.update(torch.randn(4, 3), None, list("abcd"))
    return accumulator


def test_unused_parameters():
    accumulator = update(Net())
    with pytest.warns(UserWarning, match=r"no part in the output.*spare\.weight, spare\.bias"):
        fisher = accumulator.result()
    assert fisher.unused == ("spare.weight", "spare.bias")
    assert not fisher.tensors["spare.weight"].any()
    assert accumulator.coverage()["spare.weight"] == "unused"


def test_frozen_parameters(single_example_loop):
    model = Net()
    model.spare = nn.Identity()
    model.a.weight.requires_grad_(False)
    with pytest.raises(InputError, match=r"got frozen a\.weight"):
        FisherAccumulator(model)
    accumulator = update(model, strict=False)
    assert list(accumulator.result().tensors) == ["a.bias", "b.weight", "b.bias"]
    assert accumulator.coverage() == {
        "a.bias": "linear", "b.weight": "linear", "b.bias": "linear", "a.weight": "frozen"
    }  # fmt: skip
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(InputError, match="got none"):
        FisherAccumulator(model, strict=False)


def test_tied_parameters(single_example_loop, assert_same_fisher):
    model = Net().double()
    model.spare = nn.Identity()
    model.b.weight = model.a.weight
    with pytest.raises(InputError, match=r"tied b\.weight = a\.weight"):
        FisherAccumulator(model)
    x, y = torch.randn(3, 3).double(), torch.ones(3, 3).double()
    accumulator = FisherAccumulator(model, labels="true", strict=False)
    with accumulator:
        accumulator.update(x, y, list("abc"))
    assert_same_fisher(accumulator.result().tensors, single_example_loop(model, x, y))


def test_parameters_that_share_memory_as_two_objects():
    model = Net()
    model.b.weight = nn.Parameter(model.a.weight.data)
    with pytest.raises(InputError, match=r"tied b\.weight = a\.weight as two objects"):
        FisherAccumulator(model, strict=False)


def test_one_module_under_two_names_is_no_tie():
    model = Net()
    model.spare = model.a
    assert set(update(model).result().tensors) == {"a.weight", "a.bias", "b.weight", "b.bias"}


def test_batch_norm_without_running_statistics():
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3, track_running_stats=False))
    with pytest.raises(InputError, match=r"batch norm 1\.weight: expected running statistics"):
        FisherAccumulator(model)


def test_batch_norm_in_training_mode_uses_its_running_statistics():
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).train()
    update(model)
    assert model.training
    assert not model[1].running_mean.any()


def test_complex_parameters():
    model = nn.Linear(3, 3).to(torch.complex64)
    with pytest.raises(InputError, match=r"floating-point parameters .got weight torch\.complex64"):
        FisherAccumulator(model)


def test_random_forward():
    class Noisy(nn.Linear):
        def forward(self, x):
            return nn.functional.dropout(super().forward(x), 0.5, training=True)

    with pytest.raises(InputError, match="expected a deterministic forward"):
        update(Noisy(3, 3))


def test_examples_that_influence_one_another():
    class Mixing(nn.Linear):
        def forward(self, x):
            return super().forward(x - x.mean(0))

    with pytest.raises(InputError, match=r"do not influence one another .got another output for a alone"):
        update(Mixing(3, 3))


def test_output_that_is_not_logits():
    class Pair(nn.Linear):
        def forward(self, x):
            return super().forward(x), "text"

    with pytest.raises(InputError, match=r"expected logits or a list of them .got tuple of Tensor, str"):
        update(Pair(3, 3))


def test_output_without_a_batch_axis():
    class Mean(nn.Linear):
        def forward(self, x):
            return super().forward(x).mean(0)

    with pytest.raises(InputError, match=r"network output: expected \[4, ...\] .got \[3\]"):
        update(Mean(3, 3))
