import pytest
import torch
from torch import nn

from timm_ext.errors import InputError
from timm_ext.fisher import FisherAccumulator
from timm_ext.fisher.micro_batch import examples_at_a_time, micro_batches

IDS = list("abcde")


def accumulate(micro_batch, labels="true"):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1), nn.InstanceNorm2d(3, affine=True), nn.Conv2d(3, 1, 1)
    )
    x = torch.randn(5, 2, 6, 7)
    y = (torch.rand(5, 1, 6, 7) < 0.3).float()
    sizes = []
    model.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    with FisherAccumulator(model.double(), labels=labels, micro_batch=micro_batch) as accumulator:
        accumulator.update(x.double(), y.double(), IDS)
    return accumulator.result(), sizes


@pytest.mark.parametrize("labels", ["true", "sampled"])
@pytest.mark.parametrize(("micro_batch", "parts"), [(1, [1] * 5), (2, [2, 2, 1]), (5, [5]), (99, [5])])
def test_the_fisher_is_that_of_the_whole_batch(micro_batch, parts, labels):
    whole, _ = accumulate(None, labels)
    divided, sizes = accumulate(micro_batch, labels)
    assert sizes == [1, *parts]  # the first example is also tried alone
    assert divided.count == whole.count == 5
    for name, tensor in whole.tensors.items():
        torch.testing.assert_close(divided.tensors[name], tensor, rtol=1e-12, atol=1e-18)


@pytest.mark.parametrize(
    ("shape", "parameters", "count"),
    [
        ((8, 4, 32, 32, 32), 2_070_000, 7),
        ((8, 4, 16, 16, 16), 2_070_000, 54),
        ((8, 4, 48, 48, 48), 2_070_000, 2),
        ((8, 4, 32, 32, 32), 8_270_000, 7),
        ((8, 4, 32, 32, 32), 33_000_000, 8),
        ((8, 4, 48, 48, 48), 8_270_000, 2),
        ((8, 4, 64, 64, 64), 8_270_000, 1),
        ((8, 4, 128, 128, 128), 8_270_000, 1),
        ((8, 4, 1, 1, 1), 10, 221184),
        ((8, 10), 10, 221184),
    ],
)
def test_small_examples_go_together(shape, parameters, count):
    assert examples_at_a_time(torch.empty(1).expand(shape), parameters) == count


def test_all_examples_go_together_elsewhere():
    assert examples_at_a_time(torch.empty(8, 4, 64, 64, 64, device="meta"), 10) == 8


def test_labels_that_cannot_be_divided_keep_the_batch_whole():
    x = torch.zeros(5, 1)
    parts = list(micro_batches(2, x, {"any": "thing"}, IDS, 1))
    assert parts == [(x, {"any": "thing"}, IDS)]


@pytest.mark.parametrize("micro_batch", [0, -1, 1.5, True, "all"])
def test_refuses(micro_batch):
    with pytest.raises(
        InputError, match=r"micro_batch: expected a count of at least 1, 'auto' or None .got "
    ):
        FisherAccumulator(nn.Linear(1, 1), micro_batch=micro_batch)
