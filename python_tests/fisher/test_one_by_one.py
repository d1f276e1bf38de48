"""Examples of models with parameters that no rule covers go one at a time."""

import torch
from torch import nn
from torch.nn import functional

from timm_ext.fisher import FisherAccumulator

IDS = list("abcd")


class Windows(nn.Module):
    """Attention as in Swin: windows folded into the batch, a table of biases, embedded positions."""

    def __init__(self, size=4, channels=6, heads=2):
        super().__init__()
        self.size, self.heads = size, heads
        self.embed = nn.Conv2d(2, channels, 1)
        self.places = nn.Parameter(torch.randn(1, channels, 1, 8))
        self.norm = nn.LayerNorm(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.table = nn.Parameter(torch.randn((2 * size - 1) ** 2, heads))
        self.spread = nn.Conv1d(channels, channels, 3, padding=1)  # over the positions of a window
        self.head = nn.Conv2d(channels, 2, 1)
        far = torch.arange(size)[:, None] - torch.arange(size) + size - 1
        self.register_buffer(
            "index", (far[:, None, :, None] * (2 * size - 1) + far[None, :, None, :]).flatten()
        )

    def forward(self, x):
        x = self.embed(x) + self.places
        (batch, channels, height, width), size = x.shape, self.size
        cut = x.view(batch, channels, height // size, size, width // size, size)
        rows = self.norm(cut.permute(0, 2, 4, 3, 5, 1).reshape(-1, size * size, channels))
        q, k, v = self.qkv(rows).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        bias = self.table[self.index].view(size * size, size * size, self.heads).permute(2, 0, 1)
        attended = (q @ k.mT + bias).softmax(-1) @ v
        rows = rows + self.spread(attended.transpose(1, 2).reshape(len(rows), size * size, channels).mT).mT
        grid = rows.view(batch, height // size, width // size, size, size, channels)
        return self.head(grid.permute(0, 5, 1, 3, 2, 4).reshape(x.shape))


class InTwoWays(nn.Module):
    """A weight that a rule sees, and that is also used where none does."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 3))
        self.scale = nn.Parameter(torch.randn(3))

    def forward(self, x):
        return functional.linear(functional.linear(x, self.weight), self.weight) * self.scale + (
            x @ self.weight
        )


def windows():
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(4, 2, 8, 8, dtype=torch.float64, generator=generator)
    y = (torch.rand(4, 2, 8, 8, generator=generator) < 0.4).double()
    return Windows().double(), x, y


def estimate(model, x, y, size, **options):
    accumulator = FisherAccumulator(model, labels="true", **options)
    with accumulator:
        for first in range(0, len(x), size):
            part = slice(first, first + size)
            accumulator.update(x[part], y[part], IDS[part])
    return accumulator


def test_windows_in_the_batch_axis(single_example_loop, assert_same_fisher):
    model, x, y = windows()
    expected = single_example_loop(model, x, y)
    for size in (1, 2, 4):
        accumulator = estimate(model, x, y, size)
        assert_same_fisher(accumulator.result().tensors, expected)
        assert accumulator.coverage() == {
            "places": "fallback", "table": "fallback",
            "embed.weight": "convolution", "embed.bias": "convolution",
            "norm.weight": "layer norm", "norm.bias": "layer norm",
            "qkv.weight": "linear", "qkv.bias": "linear",
            "spread.weight": "convolution", "spread.bias": "convolution",
            "head.weight": "convolution", "head.bias": "convolution",
        }  # fmt: skip


def test_the_square_of_a_batch_sum_is_another_thing(single_example_loop):
    model, x, y = windows()
    expected = single_example_loop(model, x, y)
    value = functional.binary_cross_entropy_with_logits(model(x), y, reduction="sum")
    shortcut = torch.autograd.grad(value, list(model.parameters()))
    for gradient, truth in zip(shortcut, expected.values(), strict=True):
        assert (gradient.square() / len(x) - truth).norm() > 0.1 * truth.norm()


def test_weight_with_and_without_rule(single_example_loop, assert_same_fisher):
    torch.manual_seed(0)
    model, x = InTwoWays().double(), torch.randn(4, 3, dtype=torch.float64)
    y = (torch.rand(4, 3) < 0.5).double()
    expected = single_example_loop(model, x, y)
    for size in (1, 4):
        assert_same_fisher(estimate(model, x, y, size).result().tensors, expected)


def test_same_bits_in_any_division():
    """As after an interrupt: what the first batch found out, a later one knows."""
    model, x, y = windows()
    results = [estimate(model.float(), x.float(), y.float(), size).result().tensors for size in (1, 2, 4)]
    for other in results[1:]:
        assert all(torch.equal(tensor, other[name]) for name, tensor in results[0].items())


def test_several_samples_of_labels(assert_same_fisher):
    model, x, _ = windows()
    results = []
    for size in (1, 4):
        accumulator = FisherAccumulator(model, samples=3)
        with accumulator:
            for first in range(0, 4, size):
                accumulator.update(x[first : first + size], None, IDS[first : first + size])
        results.append(accumulator.result().tensors)
    assert_same_fisher(results[1], results[0])


def test_labels_that_cannot_be_divided(single_example_loop, assert_same_fisher):
    """The scores come from the whole batch, the gradients of each example alone."""
    model, x, y = windows()

    def likelihood(logits, target):
        return (
            -functional.binary_cross_entropy_with_logits(logits, target["y"], reduction="none")
            .flatten(1)
            .sum(1)
        )

    accumulator = FisherAccumulator(model, likelihood=likelihood, labels="true")
    with accumulator:
        accumulator.update(x, {"y": y}, IDS)
    assert_same_fisher(accumulator.result().tensors, single_example_loop(model, x, y))
