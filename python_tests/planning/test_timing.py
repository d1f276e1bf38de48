import torch
from torch import nn

from timm_ext.planning import step_seconds


def test_a_cpu_takes_small_volumes_and_scales() -> None:
    seen = []

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            seen.append(tuple(images.shape))
            return images * self.weight

    model = Net()
    seconds = step_seconds(model, (2, 3, 96, 40, 50), torch.device("cpu"), 16)
    assert set(seen) == {(2, 3, 48, 48, 48)}
    assert seconds > 0
    assert model.weight.grad is None
