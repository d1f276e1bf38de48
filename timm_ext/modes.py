"""The one way to change the mode of a model for a while; then every module is back as it was."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

from torch import nn


def evaluating(model: nn.Module) -> AbstractContextManager[None]:
    """Put every module of a model in eval mode for the length of the block and give each its own mode back.

    A model is often in both modes at once: a frozen batch norm stays in eval mode while the rest is trained.
    """
    return in_mode(model, training=False)


@contextmanager
def in_mode(model: nn.Module, *, training: bool) -> Iterator[None]:
    """Put every module of a model in one mode for the length of the block and give each its own mode back."""
    # A frozen TorchScript module has no mode at all.
    modes = {module: module.training for module in model.modules() if hasattr(module, "training")}
    model.train(training)
    try:
        yield
    finally:
        # Parents come before their children, whose modes they set; `train` may do more than set a flag.
        for module, mode in modes.items():
            if module.training != mode:
                module.train(mode)
