"""`nearest_doubling3d` against interpolation."""

import pytest
import torch
from torch.library import opcheck
from torch.nn.functional import interpolate

from timm_ext.layer_ops import nearest_doubling3d


@pytest.mark.parametrize("shape", [(1, 3, 4, 5, 6), (2, 5, 1, 3, 17), (1, 1, 1, 1, 1), (3, 2, 2, 2, 33)])
@pytest.mark.parametrize("strided", [False, True])
def test_it_is_nearest_neighbour_interpolation(shape, strided) -> None:
    input = torch.randn(shape)
    if strided:
        input = input.to(memory_format=torch.channels_last_3d)
    assert torch.equal(nearest_doubling3d(input), interpolate(input, scale_factor=2))


def test_nothing_stays_nothing() -> None:
    assert nearest_doubling3d(torch.zeros(0, 3, 4, 5, 6)).shape == (0, 3, 8, 10, 12)
    assert nearest_doubling3d(torch.zeros(1, 3, 4, 0, 6)).shape == (1, 3, 8, 0, 12)


def test_opcheck() -> None:
    opcheck(torch.ops.timm_ext.nearest_doubling3d.default, (torch.randn(2, 3, 4, 5, 6),))


@pytest.mark.parametrize(
    ("input", "message"),
    [
        (torch.zeros(1, 2, 3, 4, 5).double(), r"input must be float32 \(got float64\)"),
        (torch.zeros(2, 3, 4, 5), r"input must have 5 axes \(got \[2, 3, 4, 5\]\)"),
    ],
)
def test_what_does_not_fit_is_refused(input, message) -> None:
    with pytest.raises(RuntimeError, match="nearest_doubling3d: " + message):
        nearest_doubling3d(input)
