"""Every layer type against a loop over single examples, in float64."""

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from timm_ext.errors import InputError
from timm_ext.fisher import FisherAccumulator

BATCH = 5


class Called(nn.Module):
    """A module whose forward is the given function of itself and the input."""

    def __init__(self, function, **members):
        super().__init__()
        for name, member in members.items():
            setattr(self, name, member)
        self.function = function

    def forward(self, x):
        return self.function(self, x)


def conv(axes, *arguments, **options):
    return (nn.Conv1d, nn.Conv2d, nn.Conv3d)[axes - 1](*arguments, **options)


def transposed(axes, *arguments, **options):
    return (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[axes - 1](*arguments, **options)


def between(axes, layer, channels=4):
    """The layer between a convolution and a head, so that its input gradient matters, too."""
    return nn.Sequential(
        conv(axes, 2, 4, 3, padding=1), nn.Tanh(), layer, nn.Tanh(), conv(axes, channels, 2, 1)
    )


def convolutions():
    for axes in (1, 2, 3):
        options = {
            "plain": {},
            "strided": {"stride": 2, "padding": 1},
            "dilated": {"dilation": 2, "padding": 2},
            "grouped": {"groups": 2},
            "depthwise": {"groups": 4, "padding": 1},
            "same": {"padding": "same"},
            "valid": {"padding": "valid"},
            "no bias": {"bias": False},
            "reflect": {"padding": 1, "padding_mode": "reflect"},
            "circular same": {"padding": "same", "padding_mode": "circular"},
        }
        for name, option in options.items():
            yield f"conv{axes}d {name}", axes, between(axes, conv(axes, 4, 4, 3, **option))
        yield f"conv{axes}d same even", axes, between(axes, conv(axes, 4, 4, 4, padding="same", dilation=1))
        options = {
            "plain": {},
            "strided": {"stride": 2, "padding": 1, "output_padding": 1},
            "dilated": {"dilation": 2},
            "grouped": {"groups": 2, "stride": 2},
            "no bias": {"bias": False},
        }
        for name, option in options.items():
            yield f"transposed{axes}d {name}", axes, between(axes, transposed(axes, 4, 4, 3, **option))
    yield (
        "conv3d mixed",
        3,
        between(3, conv(3, 4, 4, (3, 1, 2), stride=(1, 2, 1), padding=(1, 0, 1), dilation=(1, 1, 2))),
    )
    yield (
        "conv3d inplace",
        3,
        nn.Sequential(conv(3, 2, 3, 3), nn.LeakyReLU(0.1, inplace=True), conv(3, 3, 2, 1)),
    )


def norms():
    for axes in (1, 2, 3):
        instance = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)[axes - 1]
        batch = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[axes - 1]
        yield f"instance{axes}d", axes, between(axes, instance(4, affine=True))
        yield f"instance{axes}d plain", axes, between(axes, instance(4))
        yield (
            f"instance{axes}d running",
            axes,
            between(axes, instance(4, affine=True, track_running_stats=True)),
        )
        yield f"batch{axes}d", axes, between(axes, batch(4))
        yield f"batch{axes}d plain", axes, between(axes, batch(4, affine=False))
        yield f"group{axes}d", axes, between(axes, nn.GroupNorm(2, 4))
        yield f"group{axes}d one each", axes, between(axes, nn.GroupNorm(4, 4))
    yield "group plain", 2, between(2, nn.GroupNorm(2, 4, affine=False))
    yield "layer last", 2, between(2, nn.LayerNorm(7))
    yield "layer two axes", 2, between(2, nn.LayerNorm((7, 7)))
    yield "layer whole example", 2, between(2, nn.LayerNorm((4, 7, 7)))
    yield "layer no bias", 2, between(2, nn.LayerNorm(7, bias=False))
    yield (
        "instance then inplace",
        3,
        nn.Sequential(
            conv(3, 2, 4, 3), nn.InstanceNorm3d(4, affine=True), nn.LeakyReLU(inplace=True), conv(3, 4, 1, 1)
        ),
    )


def others():
    yield "linear", 0, nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2))
    yield "linear on last axis", 2, between(2, nn.Linear(7, 5))
    yield "linear no bias", 0, nn.Sequential(nn.Linear(6, 5, bias=False), nn.Tanh(), nn.Linear(5, 2))
    yield "prelu", 3, between(3, nn.PReLU(4))
    yield "bilinear", 0, Called(lambda m, x: m.b(x, x.tanh()), b=nn.Bilinear(6, 6, 2))
    yield (
        "embedding",
        0,
        Called(lambda m, x: m.head(m.e((x > 0).long()).mean(1)), e=nn.Embedding(2, 3), head=nn.Linear(3, 2)),
    )
    yield (
        "attention",
        2,
        Called(
            lambda m, x: m.a(*[x.flatten(2).transpose(1, 2)] * 3)[0],
            a=nn.MultiheadAttention(2, 1, batch_first=True),
        ),
    )
    yield "lstm", 2, Called(lambda m, x: m.r(x.flatten(2))[0], r=nn.LSTM(49, 3, batch_first=True))


def free_parameters():
    yield (
        "raw parameter",
        3,
        Called(
            lambda m, x: m.c(x) * m.gain + m.offset,
            c=conv(3, 2, 2, 3),
            gain=nn.Parameter(torch.rand(2, 1, 1, 1)),
            offset=nn.Parameter(torch.rand(1)),
        ),
    )
    yield (
        "functional",
        3,
        Called(
            lambda m, x: functional.conv3d(x, weight=m.w, padding=1),
            w=nn.Parameter(torch.rand(2, 2, 3, 3, 3)),
        ),
    )
    yield "weight norm", 3, nn.utils.parametrizations.weight_norm(conv(3, 2, 2, 3))
    yield "reused", 3, Called(lambda m, x: m.c(m.c(x).tanh()), c=conv(3, 2, 2, 3, padding=1))
    yield (
        "reused norm",
        3,
        Called(
            lambda m, x: m.c(m.n(m.n(x).tanh() + x)), n=nn.InstanceNorm3d(2, affine=True), c=conv(3, 2, 2, 3)
        ),
    )
    yield "reused linear", 0, Called(lambda m, x: m.c(m.c(x).tanh()), c=nn.Linear(6, 6))
    yield "rule and otherwise", 3, Called(lambda m, x: m.c(x) * m.c.weight.sum(), c=conv(3, 2, 2, 3))
    yield (
        "checkpointed",
        3,
        Called(
            lambda m, x: m.b(checkpoint(m.a, x, use_reentrant=False)),
            a=nn.Sequential(conv(3, 2, 4, 3), nn.InstanceNorm3d(4, affine=True), nn.Tanh()),
            b=conv(3, 4, 1, 1),
        ),
    )
    yield "dropout", 3, between(3, nn.Dropout3d(0.5))
    yield "skip", 3, Called(lambda m, x: m.h(m.n(m.c(x)) + m.c(x)), c=conv(3, 2, 4, 3),
                            n=nn.InstanceNorm3d(4), h=conv(3, 4, 1, 1))  # fmt: skip


def other_first_axes():
    yield (
        "batch not first",
        2,
        Called(
            lambda m, x: (
                m.c(x.permute(3, 1, 0, 2).reshape(7, 2, -1)).mean(0).reshape(2, len(x), 7).transpose(0, 1)
            ),
            c=conv(1, 2, 2, 1),
        ),
    )
    # With as many time steps as examples, the shapes alone do not tell that the first axis is not the batch.
    yield (
        "as many steps as examples",
        2,
        Called(
            lambda m, x: m.l(x[:, :, :BATCH].flatten(3).permute(2, 0, 1, 3)).transpose(0, 1),
            l=nn.Linear(7, 2),
        ),
    )
    yield (
        "folded batch",
        2,
        Called(lambda m, x: m.c(x.flatten(0, 1).unsqueeze(1)).reshape(len(x), -1), c=conv(2, 1, 1, 3)),
    )


CASES = {
    name: (axes, model)
    for kind in (convolutions, norms, others, free_parameters, other_first_axes)
    for name, axes, model in kind()
}


def prepared(name):
    axes, model = CASES[name]
    generator = torch.Generator().manual_seed(3)
    model = model.double()
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.5
    for buffer_name, buffer in model.named_buffers():
        if buffer_name.endswith("running_var"):
            buffer.copy_(torch.rand(buffer.shape, generator=generator) + 0.5)
    shape = (BATCH, 2, *[7] * axes) if axes else (BATCH, 6)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        logits = model.eval()(x)
    y = (torch.rand(logits.shape, generator=generator) < 0.5).double()
    return model, x, y


def estimate(model, x, y, sizes):
    accumulator = FisherAccumulator(model, labels="true")
    start = 0
    with accumulator:
        for size in sizes:
            part = slice(start, start + size)
            accumulator.update(x[part], y[part], [str(n) for n in range(start, start + size)])
            start += size
    return accumulator


@pytest.mark.parametrize("name", CASES)
def test_equals_single_example_loop(name, single_example_loop, assert_same_fisher):
    model, x, y = prepared(name)
    expected = single_example_loop(model, x, y)
    for sizes in ([BATCH], [1] * BATCH, [2, 3]):
        assert_same_fisher(estimate(model, x, y, sizes).result().tensors, expected)


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("conv3d strided", "convolution"),
        ("conv2d reflect", "convolution"),
        ("conv1d same even", "convolution"),
        ("transposed3d grouped", "transposed convolution"),
        ("instance3d", "instance norm"),
        ("instance2d running", "instance norm"),
        ("batch3d", "batch norm"),
        ("group2d", "group norm"),
        ("layer last", "layer norm"),
        ("linear on last axis", "linear"),
        ("prelu", "prelu"),
    ],
)
def test_coverage_names_the_rule(name, rule):
    coverage = estimate(*prepared(name), [BATCH]).coverage()
    assert coverage["2.weight"] == rule
    assert coverage["4.weight"] == "convolution"


def test_coverage_of_use_by_rule_and_otherwise():
    assert estimate(*prepared("rule and otherwise"), [BATCH]).coverage() == {
        "c.weight": "fallback", "c.bias": "convolution"
    }  # fmt: skip


@pytest.mark.parametrize("count", [1, 3])
def test_parameters_of_a_norm_with_gaps(count, single_example_loop, assert_same_fisher):
    model = nn.Sequential(conv(3, 2, 4, 3), nn.InstanceNorm3d(4, affine=True), conv(3, 4, 1, 1))
    model[1].weight = nn.Parameter(torch.arange(1.0, 9)[::2])
    model[1].bias = nn.Parameter(torch.arange(8.0)[::2])
    x = torch.randn(count, 2, 5, 5, 5, generator=torch.Generator().manual_seed(0))
    y = torch.ones_like(model(x)).detach()
    fisher = estimate(model, x, y, [count]).result()
    expected = single_example_loop(model.double(), x.double(), y.double())
    assert_same_fisher(fisher.tensors, expected, relative=2e-5)


@pytest.mark.parametrize("name", ["batch not first", "as many steps as examples", "folded batch"])
def test_axis_order_is_seen(name):
    assert batches_of_backwards(*prepared(name)) == [1] * BATCH


def test_examples_whose_parameters_have_rules_stay_together():
    assert batches_of_backwards(*prepared("conv3d strided")) == [BATCH]


def batches_of_backwards(model, x, y):
    """How many examples each backward is of."""
    seen = []

    class Seen(torch.autograd.Function):
        @staticmethod
        def forward(ctx, logits):
            return logits.clone()

        @staticmethod
        def backward(ctx, grad):
            seen.append(len(grad))
            return grad

    estimate(Called(lambda m, x: Seen.apply(m.model(x)), model=model), x, y, [BATCH])
    return seen


@pytest.mark.parametrize(
    "norm", [nn.InstanceNorm3d(4), nn.InstanceNorm3d(4, affine=True), nn.GroupNorm(4, 4)]
)
@pytest.mark.parametrize("layer", [conv(3, 2, 4, 3), transposed(3, 2, 4, 3)])
def test_bias_in_front_of_instance_norm_is_zero(norm, layer, single_example_loop):
    model = nn.Sequential(layer, nn.Dropout3d(0.4), nn.Identity(), norm, nn.Tanh(), conv(3, 4, 1, 1)).double()
    x = torch.randn(3, 2, 5, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = torch.ones_like(model(x))
    accumulator = estimate(model, x, y, [3])
    fisher = accumulator.result()
    assert fisher.zero == ("0.bias",)
    assert accumulator.coverage()["0.bias"] == "zero"
    assert not fisher.tensors["0.bias"].any()
    expected = single_example_loop(model, x, y)
    assert expected["0.bias"].max() < 1e-25 * expected["0.weight"].max()


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(conv(3, 2, 4, 3), nn.GroupNorm(2, 4), conv(3, 4, 1, 1)),
        nn.Sequential(conv(3, 2, 4, 3), nn.Tanh(), nn.InstanceNorm3d(4), conv(3, 4, 1, 1)),
        nn.Sequential(
            conv(3, 2, 4, 3), nn.InstanceNorm3d(4, affine=True, track_running_stats=True), conv(3, 4, 1, 1)
        ),
        CASES["skip"][1],
        nn.Sequential(nn.Linear(5, 5), nn.InstanceNorm3d(2), conv(3, 2, 1, 1)),
    ],
)
def test_other_biases_are_not_zero(model, single_example_loop):
    model = model.double()
    x = torch.randn(3, 2, 5, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = torch.zeros_like(model.eval()(x))
    fisher = estimate(model, x, y, [3]).result()
    assert fisher.zero == ()
    first = next(name for name in fisher.tensors if name.endswith("bias"))
    assert fisher.tensors[first].max() > 1e-6


def test_zero_bias_is_found_under_autocast():
    model = nn.Sequential(conv(3, 2, 4, 3), nn.InstanceNorm3d(4, affine=True), conv(3, 4, 1, 1))
    accumulator = FisherAccumulator(model, precision="bf16-mixed")
    with accumulator:
        accumulator.update(torch.randn(2, 2, 5, 5, 5), None, ["a", "b"])
    assert accumulator.result().zero == ("0.bias",)


def test_batch_statistics_are_refused():
    called = Called(
        lambda m, x: functional.batch_norm(x, None, None, m.gain, m.shift, training=True),
        gain=nn.Parameter(torch.ones(2)),
        shift=nn.Parameter(torch.ones(2)),
    )
    accumulator = FisherAccumulator(called)
    with accumulator, pytest.raises(InputError, match="batch norm gain: expected running statistics"):
        accumulator.update(torch.randn(3, 2, 5), None, ["a", "b", "c"])


def test_instance_norm_of_one_voxel_is_refused_as_by_torch():
    accumulator = FisherAccumulator(nn.Sequential(conv(2, 2, 4, 3), nn.InstanceNorm2d(4)))
    with accumulator, pytest.raises(ValueError, match="more than 1 spatial element"):
        accumulator.update(torch.randn(2, 2, 3, 3), None, ["a", "b"])
