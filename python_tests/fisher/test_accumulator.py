"""Sums over batches of any size: what they are, and what a pass leaves alone and holds."""

import math
import weakref

import pytest
import torch
from fisher_samples import examples, run, small_net
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from timm_ext.errors import InputError
from timm_ext.fisher import FisherAccumulator


@pytest.mark.parametrize("labels", ["sampled", "true"])
@pytest.mark.parametrize("likelihood", ["bernoulli", "dice"])
def test_same_for_any_batch_size_and_order(labels, likelihood, assert_same_fisher):
    model, (x, y, ids) = small_net(), examples()
    options = {"labels": labels, "likelihood": likelihood}
    expected = run(model, x, y, ids, **options)
    assert expected.count == 8
    for size, order in ((1, None), (2, None), (8, [3, 1, 7, 0, 2, 6, 5, 4]), (3, [7, 6, 5, 4, 3, 2, 1, 0])):
        got = run(model, x, y, ids, size=size, order=order, **options)
        assert_same_fisher(got.tensors, expected.tensors)


def test_float32_sums_do_not_depend_on_batch_size(assert_same_fisher):
    model, (x, y, ids) = small_net(torch.float32), examples(dtype=torch.float32)
    expected = run(model, x, y, ids, size=8, labels="true").tensors
    assert_same_fisher(run(model, x, y, ids, size=1, labels="true").tensors, expected, relative=1e-4)


def test_squaring_the_batch_gradient_is_not_the_fisher(single_example_loop, assert_same_fisher):
    model, (x, _, ids) = small_net().eval(), examples()
    generator = torch.Generator().manual_seed(0)
    p = model(x).sigmoid().detach()
    y = (torch.rand(p.shape, generator=generator) < p).double()
    truth = single_example_loop(model, x, y)
    value = -nn.functional.binary_cross_entropy_with_logits(model(x), y, reduction="sum") / len(x)
    shortcut = torch.autograd.grad(value, list(model.parameters()))
    # Labels drawn from the network make the examples' gradients cancel: about 1/B is left.
    share = sum(g.square().sum() for g in shortcut) / sum(t.sum() for t in truth.values())
    assert share < 2 / len(x)
    assert_same_fisher(run(model, x, y, ids, labels="true").tensors, truth)


def test_samples_share_one_forward():
    model, (x, _, ids) = nn.Conv3d(2, 1, 3), examples(2, torch.float32)
    forwards = []
    model.register_forward_hook(lambda *_: forwards.append(1))
    accumulator = FisherAccumulator(model, samples=5)
    with accumulator:
        accumulator.update(x[:1], None, ids[:1])
        forwards.clear()
        accumulator.update(x[1:], None, ids[1:])
    assert len(forwards) == 1


def test_samples_are_averaged():
    model, (x, _, ids) = small_net(), examples(4)
    first, second, third = (run(model, x, None, ids, samples=s).tensors for s in (1, 2, 3))
    for name, tensor in first.items():
        # Fewer samples are the first ones of more, so that differences of sums are squares, too.
        squares = [tensor, 2 * second[name] - tensor, 3 * third[name] - 2 * second[name]]
        assert all(bool((s >= -1e-12 * third[name].max()).all()) for s in squares)
        assert torch.equal(squares[1], squares[2]) == (not tensor.any())


def test_seed_decides(assert_same_fisher):
    model, (x, y, ids) = small_net(torch.float32), examples(4, torch.float32)
    first, again, other = (run(model, x, y, ids, seed=s).tensors for s in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first if first[name].any())


def test_global_generator_is_left_alone():
    model, (x, y, ids) = small_net(), examples(2)
    state = torch.get_rng_state()
    run(model, x, y, ids)
    assert torch.equal(state, torch.get_rng_state())


def test_sampled_labels_converge_to_the_analytic_fisher():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(40, 3, generator=generator, dtype=torch.float64)
    model = nn.Linear(3, 1).double()
    fisher = run(model, x, None, [str(n) for n in range(40)], size=40, samples=400)
    p = model(x).sigmoid().detach()
    information = p * (1 - p)
    # Standard error of 16,000 draws is below 1 %.
    assert fisher.tensors["bias"].item() == pytest.approx(information.mean().item(), rel=0.04)
    torch.testing.assert_close(
        fisher.tensors["weight"], (information * x**2).mean(0)[None], rtol=0.04, atol=0
    )


def test_sampled_classes_converge_to_the_analytic_fisher():
    x = torch.randn(40, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    model = nn.Linear(3, 4).double()
    ids = [str(n) for n in range(40)]
    fisher = run(model, x, None, ids, size=40, samples=400, likelihood="categorical")
    p = model(x).softmax(1).detach()
    torch.testing.assert_close(fisher.tensors["bias"], (p * (1 - p)).mean(0), rtol=0.06, atol=0)


def test_grad_and_modes_are_left_alone():
    model, (x, y, ids) = small_net(), examples(2)
    model.train()
    model[1].eval()
    before = [m.training for m in model.modules()]
    model[0].weight.grad = torch.full_like(model[0].weight, 3.0)
    hooks = [len(m._forward_hooks) for m in model.modules()]
    accumulator = FisherAccumulator(model)
    with accumulator:
        assert not any(m.training for m in model.modules())
        accumulator.update(x, y, ids)
    assert [m.training for m in model.modules()] == before
    assert [len(m._forward_hooks) for m in model.modules()] == hooks
    assert bool((model[0].weight.grad == 3).all())
    assert all(p.grad is None for p in list(model.parameters())[1:])


def test_modes_are_restored_after_an_error():
    model, (x, y, ids) = small_net(), examples(2)
    model.train()
    accumulator = FisherAccumulator(model)
    with pytest.raises(InputError, match="x: expected finite"), accumulator:
        accumulator.update(x * math.nan, y, ids)
    assert all(m.training for m in model.modules())
    model(x)  # ordinary calls are ordinary again
    with accumulator:
        accumulator.update(x, y, ids)
    assert accumulator.result().count == 2


class LargestTensor(TorchDispatchMode):
    """Remember the largest tensor that any operator returned."""

    def __init__(self):
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(value, torch.Tensor):
                self.largest = max(self.largest, value.untyped_storage().nbytes() // value.element_size())
        return result


@pytest.mark.parametrize("positions", [1, 4])
def test_never_batch_times_parameters(positions):
    model = nn.Sequential(nn.Linear(300, 200), nn.Tanh(), nn.Linear(200, 5))
    x = torch.randn(16, positions, 300)
    accumulator = FisherAccumulator(model)
    with accumulator, LargestTensor() as seen:
        accumulator.update(x, None, [str(n) for n in range(16)])
    assert seen.largest <= 300 * 200


def test_convolutions_never_hold_batch_times_parameters():
    model = nn.Conv3d(32, 64, 3, padding=1)
    accumulator = FisherAccumulator(model)
    with accumulator, LargestTensor() as seen:
        accumulator.update(torch.randn(4, 32, 4, 4, 4), None, list("abcd"))
    assert seen.largest == 32 * 64 * 27


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Conv3d(2, 2, 3, padding=1),
        lambda: nn.Linear(5, 5),
        lambda: nn.InstanceNorm3d(2, affine=True),
    ],
)
def test_inputs_are_freed_as_the_backward_passes(make):
    alive = []
    held = []

    def remember(module, arguments):
        held.append(weakref.ref(arguments[0].untyped_storage()))

    class Count(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            alive.append(sum(ref() is not None for ref in held))
            return grad

    class Watched(nn.Module):
        def forward(self, x):
            return Count.apply(x)

    layers = [make() for _ in range(4)]
    for layer in layers[1:]:
        layer.register_forward_pre_hook(remember)
    model = nn.Sequential(*[module for layer in layers for module in (layer, Watched())])
    accumulator = FisherAccumulator(model)
    with accumulator:
        accumulator.update(torch.randn(1, 2, 5, 5, 5), None, ["warm up"])
        held.clear()
        alive.clear()
        accumulator.update(torch.randn(2, 2, 5, 5, 5), None, ["a", "b"])
    assert alive == sorted(alive, reverse=True)
    assert alive[0] - alive[-1] >= 2


@pytest.mark.parametrize("precision", ["bf16-mixed", "ieee"])
def test_half_precision_sums_are_float32(precision):
    model, (x, y, ids) = small_net(torch.float32), examples(4, torch.float32)
    exact = run(model, x, y, ids, labels="true").tensors
    if precision == "ieee":
        model, x = model.bfloat16(), x.bfloat16()
    got = run(model, x, y, ids, labels="true", precision=precision).tensors
    for name, tensor in got.items():
        assert tensor.dtype == torch.float32
        if exact[name].any():
            assert tensor.sum().item() == pytest.approx(exact[name].sum().item(), rel=0.15)


def test_small_squares_do_not_vanish_in_half_precision():
    # 1e-5 squared is below the smallest float16.
    model = nn.Linear(4, 1).half()
    function = lambda logits, target: 1e-5 * logits.sum(1)  # noqa: E731
    fisher = run(model, torch.ones(3, 4).half(), None, list("abc"), likelihood=function, labels="true")
    torch.testing.assert_close(fisher.tensors["bias"], torch.tensor([1e-10]), rtol=1e-2, atol=0)


def test_deep_supervision_outputs_are_added(single_example_loop, assert_same_fisher):
    class Deep(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv3d(2, 2, 3, padding=1), nn.Conv3d(2, 2, 3, padding=1, stride=2)

        def forward(self, x):
            return [self.a(x), self.b(x)]

    class Summed(Deep):
        def forward(self, x):
            high, low = super().forward(x)
            return high + nn.functional.interpolate(low, size=high.shape[2:], mode="nearest")

    deep, summed = Deep().double(), Summed().double()
    summed.load_state_dict(deep.state_dict())
    x, y, ids = examples(3)
    got = run(deep, x, y[:, :2], ids, labels="true")
    assert_same_fisher(got.tensors, single_example_loop(summed, x, y[:, :2]))


def test_meta_tensors():
    data = pytest.importorskip("monai.data")
    model, (x, y, ids) = small_net(), examples(2)
    expected = run(model, x, y, ids, labels="true").tensors
    got = run(model, data.MetaTensor(x), data.MetaTensor(y), ids, labels="true").tensors
    assert all(torch.equal(tensor, expected[name]) for name, tensor in got.items())
    assert {type(tensor) for tensor in got.values()} == {torch.Tensor}


def test_bfloat16_has_the_same_bits_every_time_down_to_the_coarsest_grid():
    """oneDNN's weight gradient in bfloat16 reads memory that nobody wrote on grids of a few points."""

    def net():
        torch.manual_seed(0)
        down = [nn.Conv3d(8, 8, 3, padding=1, stride=2) for _ in range(3)]
        return nn.Sequential(
            nn.Conv3d(2, 8, 3, padding=1), *down, nn.Conv3d(8, 8, 3, padding=1), nn.Conv3d(8, 1, 1)
        )

    likelihood = lambda logits, target: logits.double().square().flatten(1).sum(1)  # noqa: E731
    x, ids = torch.randn(3, 2, 8, 8, 8, generator=torch.Generator().manual_seed(1)), list("abc")
    options = {"likelihood": likelihood, "labels": "true"}
    exact = run(net().double(), x.double(), None, ids, **options).tensors
    first = run(net(), x, None, ids, precision="bf16-mixed", **options).tensors
    for _ in range(3):
        junk = torch.full((1 << 20,), float("nan"))
        del junk
        again = run(net(), x, None, ids, precision="bf16-mixed", **options).tensors
        assert all(torch.equal(again[name], first[name]) for name in first)
    for name, tensor in first.items():
        assert tensor.dtype == torch.float32
        assert tensor.sum().item() == pytest.approx(exact[name].sum().item(), rel=0.1)
