"""Norms that would see a single value, found from shapes alone before the first step."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from timm_ext.errors import InputError
from timm_ext.inference import fitting_size
from timm_ext.modes import evaluating, in_mode
from timm_ext.networks.registry import size_divisor_of
from timm_ext.parameters import is_norm, slots_of
from timm_ext.training.settings import TrainSettings

Shape = tuple[int, ...]

_REFUSAL = "Expected more than 1"  # how PyTorch's message begins, for batch, instance and group norms alike


def check_norms(
    model: nn.Module, train: Sequence[Shape], val: Sequence[Shape], settings: TrainSettings, processes: int
) -> None:
    """Refuse training and validation images `[C, D, H, W]` of which a norm would see one value per channel.

    So many `processes` share a batch.

    Raises:
        InputError: as `refuse_single_values`.
    """
    batch, divisor = settings.batch_size // processes, size_divisor_of(model)
    with in_mode(model, training=True):
        refuse_single_values(model, [(batch, *shape) for shape in train])
    padded = [(1, channels, *fitting_size(settings.patch or edges, divisor)) for channels, *edges in val]
    with evaluating(model):
        refuse_single_values(model, padded)


def refuse_single_values(model: nn.Module, shapes: Sequence[Shape]) -> None:
    """Refuse images of which a norm would see one value per channel, of which there is no variance.

    The network, in its mode, runs on tensors `[B, C, D, H, W]` without values, so that it costs no work; one
    that needs values to run is let pass, and PyTorch refuses its step.

    Raises:
        InputError: naming the norm, what it would see and of which images.
    """
    norms = {module: name for name, module in model.named_modules() if is_norm(module)}
    if not norms:
        return
    seen: list[tuple[str, list[int]]] = []

    def note(module: nn.Module, inputs: tuple[object, ...]) -> None:
        shape = getattr(inputs[0], "shape", ()) if inputs else ()
        seen.append((norms[module], list(shape)))

    handles = [module.register_forward_pre_hook(note) for module in norms]
    try:
        for shape in sorted(set(shapes)):
            if (refusal := _refusal(model, shape)) is not None:
                name, got = seen[-1] if seen else ("", [])
                raise InputError(
                    f"norm {name}: expected more than one value per channel (got {got} from images "
                    f"{list(shape)}: larger images or patches, fewer levels or, for batch norms, a larger "
                    "batch_size mend it)"
                ) from refusal
    finally:
        for handle in handles:
            handle.remove()


def _refusal(model: nn.Module, shape: Shape) -> ValueError | None:
    """Return what a norm says to images of a shape, None if nothing."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    parameter = next(model.parameters(), None)
    device = None if parameter is None else parameter.device
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            mode = FakeTensorMode(allow_non_fake_inputs=True)
            values: dict[str, Tensor] = {name: mode.from_tensor(one) for name, one in slots_of(model)}
            with mode:
                # Called with tensors for its own: a batch norm counts its steps and moves its statistics.
                image = torch.empty(shape, device=device)
                # A layer under several names has its tensors by the first one alone.
                torch.func.functional_call(model, values, (image,), tie_weights=False)
    except InputError:
        raise
    except ValueError as error:
        return error if str(error).startswith(_REFUSAL) else None
    except Exception:
        # Without values some networks cannot run; any exception may say so.
        return None
    return None
