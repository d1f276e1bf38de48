"""The one way to evaluate a model for a while: no dropout, running statistics, then back as it was."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put every module of a model in eval mode for the length of the block and give each its own mode back.

    A model is often in both modes at once: a frozen batch norm stays in eval mode while the rest is trained.
    """
    # A frozen TorchScript module has no mode at all.
    modes = {module: module.training for module in model.modules() if hasattr(module, "training")}
    model.eval()
    try:
        yield
    finally:
        # Parents come before their children, whose modes they set; `train` may do more than set a flag.
        for module, training in modes.items():
            if module.training != training:
                module.train(training)
