"""Several processes on gloo give the Fisher of one."""

import subprocess
import sys

import pytest
import torch
from torch import distributed, nn

from timm_ext.errors import InputError
from timm_ext.fisher import FisherAccumulator
from timm_ext.fisher.reduction import Share, _check_alike, _check_once


def network(width=3):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, width, 3), nn.InstanceNorm2d(width), nn.Tanh(), nn.Conv2d(width, 1, 1))


def data(count):
    return torch.randn(count, 2, 6, 6, generator=torch.Generator().manual_seed(1))


def accumulate(indices, width=3, labels="sampled", ids=None):
    x = data(5)
    accumulator = FisherAccumulator(network(width), labels=labels)
    with accumulator:
        for n in indices:
            accumulator.update(x[n : n + 1], torch.zeros(1, 1, 4, 4), [ids or f"case{n}"])
    return accumulator


def refusal(accumulator):
    try:
        accumulator.all_reduce()
    except InputError as error:
        return str(error)
    return "accepted"


def work(rank, folder):
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    accumulator = accumulate([[0, 2, 4], [1, 3]][rank])
    accumulator.all_reduce()
    fisher = accumulator.result()
    alone = accumulate([[0, 1, 2, 3, 4], []][rank])
    alone.all_reduce()
    torch.save(
        {
            "tensors": fisher.tensors,
            "count": fisher.count,
            "zero": fisher.zero,
            "idle": (alone.result().count, alone.result().zero, alone.coverage()),
            "again": refusal(accumulator),
            "width": refusal(accumulate([rank], width=3 + rank)),
            "labels": refusal(accumulate([rank], labels=["true", "sampled"][rank])),
            "twice": refusal(accumulate([rank], ids="same")),
        },
        f"{folder}/{rank}.pt",
    )
    distributed.destroy_process_group()


def test_two_processes(tmp_path):
    # As scripts: a spawned function's module can only be imported where the source folder is on the path.
    ranks = [subprocess.Popen([sys.executable, __file__, str(rank), str(tmp_path)]) for rank in (0, 1)]
    assert [process.wait(timeout=120) for process in ranks] == [0, 0]
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    expected = accumulate(range(5)).result()
    for got in (first, second):
        assert (got["count"], got["zero"]) == (5, ("0.bias",))
        assert got["idle"][:2] == (5, ("0.bias",))
        assert got["idle"][2]["0.weight"] == "convolution"
        for name, tensor in expected.tensors.items():
            torch.testing.assert_close(got["tensors"][name], tensor, rtol=1e-6, atol=0)
        assert "expected one call" in got["again"]
        assert "0.weight: [3, 2, 3, 3] on rank 0, [4, 2, 3, 3] on rank 1" in got["width"]
        assert "rank 1: expected the settings of rank 0" in got["labels"]
        assert "example same: expected on one rank only (got ranks 0 and 1" in got["twice"]


def share(**change):
    fields = {
        "settings": "a",
        "shapes": {"w": (2,)},
        "ids": ("x",),
        "coverage": {},
        "zero": None,
        "broken": False,
    }
    return Share(**(fields | change))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (share(settings="b"), "rank 1: expected the settings of rank 0, a .got b"),
        (
            share(shapes={"w": (3,), "v": (1,)}),
            r"another.\n  w: \[2\] on rank 0, \[3\] on rank 1\n  v: none on rank 0",
        ),
        (share(broken=True), "rank 1: expected whole updates"),
    ],
)
def test_ranks_must_agree(other, message):
    with pytest.raises(InputError, match=message):
        _check_alike([share(), other])


def test_examples_belong_to_one_rank():
    _check_once([("a", "b"), ("c",)])
    with pytest.raises(InputError, match=r"example b: expected on one rank only .got ranks 0 and 2"):
        _check_once([("a", "b"), ("c",), ("b",)])


def test_one_process_needs_no_group():
    accumulator = accumulate([0, 1])
    before = accumulator.result().tensors
    accumulator.all_reduce()
    assert all(torch.equal(before[name], tensor) for name, tensor in accumulator.result().tensors.items())


if __name__ == "__main__":
    work(int(sys.argv[1]), sys.argv[2])
