"""What an accumulator refuses, and that nothing is added then."""

import math

import pytest
import torch
from fisher_samples import examples, run, small_net
from torch import nn

from timm_ext.errors import InputError
from timm_ext.fisher import FisherAccumulator


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"likelihood": "gauss"},
            "likelihood: expected bernoulli, categorical, dice or a callable .got 'gauss'",
        ),
        ({"labels": "guessed"}, "labels: expected 'sampled' or 'true' .got 'guessed'"),
        ({"likelihood": lambda z, y: z.sum(1)}, "likelihood: expected one that can sample"),
        ({"samples": 0}, "samples: expected at least 1 .got 0"),
        ({"samples": 2, "labels": "true"}, "samples: expected 1 for true labels .got 2"),
        (
            {"precision": "double"},
            "precision: expected one of ieee, tf32, bf16-mixed, 16-mixed .got 'double'",
        ),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(InputError, match=message):
        FisherAccumulator(small_net(), **options)


def nan_at(x, index):
    x = x.clone()
    x[index, 0, 0, 0, 0] = math.nan
    return x


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, y, ids: (nan_at(x, 1), y, ids), "x: expected finite values .* example case1"),
        (lambda x, y, ids: (x, nan_at(y, 1), ids), "y: expected labels 0 or 1 .got nan in example case1"),
        (lambda x, y, ids: (x, y * 2, ids), "y: expected labels 0 or 1 .got 2 in example case0"),
        (lambda x, y, ids: (x, y[:, :2], ids), r"y: expected shape \[2, 3, 6, 6, 6\] .got \[2, 2, 6, 6, 6\]"),
        (lambda x, y, ids: (x, None, ids), "y: expected shape .* .got NoneType"),
        (
            lambda x, y, ids: (x, y, ids[:1]),
            r"ids: expected 2 strings, one for each example \(got 1: 'case0'\)",
        ),
        (lambda x, y, ids: (x, y, [1, 2]), "ids: expected 2 strings"),
        (lambda x, y, ids: (x, y, ["a", "a"]), "example a: expected once"),
        (lambda x, y, ids: (x[:0], y[:0], []), "x: expected a tensor .* with B >= 1"),
        (lambda x, y, ids: (x * 1e308, y, ids), "expected finite values .* example case0, case1"),
    ],
)
def test_batches_are_checked_before_anything_is_added(change, message):
    model, (x, y, ids) = small_net(), examples(2)
    model[5] = nn.Tanh()  # every parameter has a rule: the examples stay together
    accumulator = FisherAccumulator(model, labels="true")
    with accumulator:
        with pytest.raises(InputError, match=message):
            accumulator.update(*change(x, y, ids))
        with pytest.raises(InputError, match=r"at least one example .got none"):
            accumulator.result()
        accumulator.update(x, y, ids)
    expected = run(model, x, y, ids, labels="true").tensors
    assert all(torch.equal(tensor, expected[name]) for name, tensor in accumulator.result().tensors.items())


def test_examples_count_once_over_updates():
    model, (x, y, ids) = small_net(), examples(2)
    accumulator = FisherAccumulator(model)
    with accumulator:
        accumulator.update(x, y, ids)
        with pytest.raises(InputError, match="example case1: expected once"):
            accumulator.update(x[1:], y[1:], ids[1:])


def test_update_needs_the_context():
    with pytest.raises(InputError, match="expected a call inside"):
        FisherAccumulator(small_net()).update(*examples(2))


def test_loss_that_is_not_finite_names_the_example():
    def function(logits, target):
        return logits.flatten(1).sum(1) / target

    model, (x, _, ids) = small_net(), examples(2)
    accumulator = FisherAccumulator(model, likelihood=function, labels="true")
    with accumulator, pytest.raises(InputError, match=r"log-likelihood: expected finite .* example case1"):
        accumulator.update(x, torch.tensor([1.0, 0.0]), ids)


def test_network_output_that_is_not_finite_names_the_example():
    class Root(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(1))

        def forward(self, x):
            return (x * self.w).sqrt()

    accumulator = FisherAccumulator(Root())
    with accumulator, pytest.raises(InputError, match=r"network output: expected finite .* example b"):
        accumulator.update(torch.tensor([[1.0], [-1.0]]), None, ["a", "b"])


def test_overflow_is_an_error_that_names_the_parameter():
    accumulator = FisherAccumulator(nn.Linear(1, 1), likelihood=lambda z, y: z.sum(1) * 1e30, labels="true")
    with accumulator:
        accumulator.update(torch.ones(1, 1), None, ["a"])
    with pytest.raises(InputError, match="overflow in weight, bias"):
        accumulator.result()


def test_a_half_done_update_spoils_the_accumulator():
    class Trap(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            raise MemoryError("no room")

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x):
            return self.b(Trap.apply(self.a(x)))

    accumulator = FisherAccumulator(Net())
    with accumulator:
        with pytest.raises(MemoryError):
            accumulator.update(torch.ones(1, 2), None, ["a"])
        with pytest.raises(InputError, match="failed half-way"):
            accumulator.update(torch.ones(1, 2), None, ["a"])
    with pytest.raises(InputError, match="failed half-way"):
        accumulator.result()
