"""Per-example gradients squared a few at a time."""

import weakref

import pytest
import torch

from timm_ext.fisher import squares
from timm_ext.fisher.squares import SquareSums
from timm_ext.layers import gradients
from timm_ext.layers.gradients import ExampleGradients

ELEMENTS = 1000
BYTES = 8 * ELEMENTS


class Recorded:
    """Gradients of seven examples, and how many of them were alive at a launch."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.values = torch.randn(7, ELEMENTS, dtype=torch.float64)
        self.launches: list[int] = []
        self._square = gradients.square_accumulate_
        for module in (gradients, squares):
            monkeypatch.setattr(module, "square_accumulate_", self._record)

    def _record(self, acc, grads, scale):
        self.launches.append(len(grads))
        self._square(acc, grads, scale)

    def square(self) -> torch.Tensor:
        total = torch.ones(ELEMENTS, dtype=torch.float64)
        ExampleGradients(len(self.values), lambda index: self.values[index].clone()).square_into(total, 0.5)
        return total


@pytest.mark.parametrize(
    ("held", "launches"),
    [
        (7 * BYTES, [7]),
        (3 * BYTES + 5, [3, 3, 1]),
        (BYTES, [1] * 7),
        (0, [1] * 7),  # one is always held
    ],
)
def test_one_launch_takes_as_many_examples_as_may_be_held(held, launches, monkeypatch) -> None:
    recorded = Recorded(monkeypatch)
    monkeypatch.setattr(gradients, "HELD_BYTES", held)
    total = recorded.square()
    assert recorded.launches == launches
    torch.testing.assert_close(total, 1 + 0.5 * recorded.values.square().sum(0), rtol=1e-14, atol=0)


def test_the_bits_do_not_depend_on_how_many_are_held(monkeypatch) -> None:
    recorded = Recorded(monkeypatch)
    results = []
    for held in (1, 2, 7):
        monkeypatch.setattr(gradients, "HELD_BYTES", held * BYTES)
        results.append(recorded.square())
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_no_more_gradients_live_than_may_be_held(monkeypatch) -> None:
    alive, most = 0, 0

    def released() -> None:
        nonlocal alive
        alive -= 1

    def example(index: int) -> torch.Tensor:
        nonlocal alive, most
        gradient = torch.full((ELEMENTS,), float(index), dtype=torch.float64)
        weakref.finalize(gradient, released)
        alive += 1
        most = max(most, alive)
        return gradient

    monkeypatch.setattr(gradients, "HELD_BYTES", 3 * BYTES)
    total = torch.zeros(ELEMENTS, dtype=torch.float64)
    ExampleGradients(10, example).square_into(total, 1.0)
    assert total[0] == sum(i * i for i in range(10))
    assert (alive, most) == (0, 3)


def test_small_parameters_are_squared_in_one_launch(monkeypatch) -> None:
    recorded = Recorded(monkeypatch)
    sizes = {"bias": 5, "norm": 7, "half": 3, "table": 5000}
    values = {name: torch.randn(4, size, dtype=torch.float32) for name, size in sizes.items()}
    values["half"] = values["half"].bfloat16()
    sums = {name: torch.ones(size) for name, size in sizes.items()}
    squares = SquareSums(sums, dict.fromkeys(sizes, 1), 0.5)
    for name, rows in values.items():
        squares.deposit(name, ExampleGradients(4, rows.__getitem__))
    assert recorded.launches == [4]  # of the table
    squares.finish()
    assert recorded.launches == [4, 8, 4]  # bias and norm; half, of another type
    squares.finish()
    assert len(recorded.launches) == 3
    for name, rows in values.items():
        torch.testing.assert_close(sums[name], 1 + 0.5 * rows.float().square().sum(0), rtol=1e-6, atol=0)
