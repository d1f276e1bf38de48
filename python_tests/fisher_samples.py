"""A network with every kind of layer, examples of it, and its Fisher in batches of any size."""

import torch
from torch import nn

from timm_ext.fisher import FisherAccumulator


def small_net(dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(
        nn.Conv3d(2, 4, 3, padding=1),
        nn.InstanceNorm3d(4, affine=True),
        nn.LeakyReLU(0.1, inplace=True),
        nn.Dropout3d(0.3),
        nn.Conv3d(4, 4, 3, stride=2, padding=1),
        nn.PReLU(),
        nn.ConvTranspose3d(4, 3, 2, stride=2),
    ).to(dtype)
    for parameter in model.parameters():
        parameter.data = (
            torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(dtype) * 0.4
        )
    return model


def examples(count=8, dtype=torch.float64):
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(count, 2, 6, 6, 6, generator=generator, dtype=torch.float64)
    y = (torch.rand(count, 3, 6, 6, 6, generator=generator) < 0.3).to(dtype)
    return x.to(dtype), y, [f"case{n}" for n in range(count)]


def run(model, x, y, ids, size=8, order=None, **options):
    order = list(range(len(x))) if order is None else order
    accumulator = FisherAccumulator(model, **options)
    with accumulator:
        for start in range(0, len(x), size):
            part = order[start : start + size]
            accumulator.update(x[part], None if y is None else y[part], [ids[n] for n in part])
    return accumulator.result()
