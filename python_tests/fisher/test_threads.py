"""Another number of threads changes a Fisher by rounding alone; the same one repeats it bit for bit."""

import pytest
import torch

from timm_ext.fisher import Fisher, FisherAccumulator
from timm_ext.networks import build_network


def fisher(threads: int, filters: int, edge: int) -> Fisher:
    torch.set_num_threads(threads)
    model = build_network(
        "isensee2017", in_channels=2, out_channels=3, seed=0, base_filters=filters, levels=3
    )
    accumulator = FisherAccumulator(model)
    with accumulator:
        x = torch.randn(2, 2, edge, edge, edge, generator=torch.Generator().manual_seed(0))
        accumulator.update(x, None, ["a", "b"])
    return accumulator.result()


@pytest.mark.parametrize(("filters", "edge"), [(2, 16), (6, 24)])
def test_threads_change_the_rounding_alone(filters: int, edge: int) -> None:
    expected = fisher(1, filters, edge).tensors
    for threads in (2, 3, 7):
        got, again = (fisher(threads, filters, edge).tensors for _ in range(2))
        for name, tensor in expected.items():
            assert torch.equal(got[name], again[name]), (threads, name)
            # Some sums are split otherwise: a few rounding errors, of which one is 6e-8.
            error = (got[name] - tensor).abs().max()
            assert error <= 1e-5 * tensor.max(), (threads, name)
