import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from timm_ext.errors import InputError
from timm_ext.fisher import FisherAccumulator, estimate_fisher


class Cases(Dataset):
    def __init__(self, count=5):
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(count, 2, 5, 5, generator=generator, dtype=torch.float64)
        self.y = (torch.rand(count, 1, 5, 5, generator=generator) < 0.5).double()

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return {"id": f"case{index}", "image": self.x[index], "target": self.y[index]}


@pytest.fixture
def model():
    return nn.Conv2d(2, 1, 3, padding=1).double()


@pytest.mark.parametrize("labels", ["sampled", "true"])
def test_equals_the_accumulator(model, labels, assert_same_fisher):
    data = Cases()
    accumulator = FisherAccumulator(model, labels=labels)
    with accumulator:
        accumulator.update(data.x, data.y, [f"case{n}" for n in range(5)])
    expected = accumulator.result()
    one_by_one = [(data.x[n : n + 1], data.y[n : n + 1], [f"case{n}"]) for n in range(5)]
    for given in (data, DataLoader(data, batch_size=4), one_by_one):
        got = estimate_fisher(model, given, labels=labels, batch_size=3)
        assert got.count == 5
        assert_same_fisher(got.tensors, expected.tensors)


def test_tuples_and_progress(model, capsys):
    data = Cases(2)
    fisher = estimate_fisher(model, [(data.x, data.y, ["a", "b"])], progress=True)
    assert fisher.count == 2
    assert "1/1" in capsys.readouterr().out


def test_examples_of_different_shapes_need_batches_of_one(model):
    data = [{"id": f"case{n}", "image": torch.randn(2, n, 5, dtype=torch.float64)} for n in (5, 6)]

    class Uneven(Dataset):
        def __len__(self):
            return len(data)

        def __getitem__(self, index):
            return data[index]

    assert estimate_fisher(model, Uneven(), batch_size=1).count == 2
    with pytest.raises(InputError, match=r"batch: expected images as tensors of one shape, or batch_size=1"):
        estimate_fisher(model, Uneven(), batch_size=2)


def test_global_generator_is_left_alone(model):
    state = torch.get_rng_state()
    estimate_fisher(model, Cases())
    assert torch.equal(state, torch.get_rng_state())


class Stream(IterableDataset):
    def __iter__(self):
        yield from ()


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        (Cases(0), {}, "expected at least one example .got none"),
        ([], {}, "expected at least one example .got none"),
        (Stream(), {}, "data: expected a data set with a length .got Stream"),
        (Cases(2), {"batch_size": 0}, "batch_size: expected at least 1 .got 0"),
        (
            [{"image": torch.ones(1)}],
            {"labels": "true"},
            "expected image, target and id .got none of id, target",
        ),
        ([3], {}, "expected a mapping with image, target and id, or three values .got int"),
    ],
)
def test_data_are_checked(model, data, options, message):
    with pytest.raises(InputError, match=message):
        estimate_fisher(model, data, **options)
