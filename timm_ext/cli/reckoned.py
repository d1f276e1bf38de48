"""Memory that commands reckon before they take it, with what takes less."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import prod
from typing import TYPE_CHECKING, Any

from timm_ext.errors import InputError
from timm_ext.system.machine import check_memory

if TYPE_CHECKING:
    from timm_ext.config import RunSettings
    from timm_ext.data.prepare import Prepared
    from timm_ext.planning import Machine, TrainingConfiguration

_WINDOWS_AT_ONCE = 4  # that prediction takes


def check_training_memory(
    configuration: "TrainingConfiguration",
    parts: "Sequence[Sequence[Prepared]]",
    machine: "Machine",
    channels: int,
) -> None:
    """Refuse a training whose steps or data memory does not hold."""
    from timm_ext.planning import free_memory, held_bytes

    data = [case for part in parts for case in part]
    needed = configuration.step_bytes + (
        held_bytes(data, channels, machine.devices) if machine.kind == "cpu" else 0
    )
    what = f"training: {configuration.batch_size} examples of {edges(configuration.size)} voxels"
    divisor = configuration.footprint.divisor
    smaller = ",".join(str(max(edge // 2 // divisor, 1) * divisor) for edge in configuration.size)
    with _hint(f"--set train.patch=[{smaller}] or --set train.batch_size=1 takes less"):
        check_memory(needed, what, available=free_memory(machine))


def check_fisher_memory(
    settings: "RunSettings", cases: "Sequence[Prepared]", network: Mapping[str, Any]
) -> None:
    """Refuse a Fisher of examples that memory does not hold."""
    from timm_ext.inference import fitting_size
    from timm_ext.planning import footprint_of, held_bytes

    footprint, patch = footprint_of(network), settings.fisher.patch
    voxels = max(prod(patch or fitting_size(case.shape, footprint.divisor)) for case in cases)
    needed = footprint.step_bytes(voxels * settings.fisher.batch_size) + held_bytes(
        cases, network["in_channels"]
    )
    what = "whole volumes" if patch is None else f"a patch of {edges(patch)}"
    with _hint(
        "--set fisher.patch=[64,64,64] takes patches of that size, --set fisher.batch_size=1 one at a time"
    ):
        check_memory(needed, f"fisher: {what}")


def within_memory(settings: "RunSettings", network: Mapping[str, Any]) -> "Callable[[Prepared], None]":
    """Return what refuses a scan that memory does not hold in the windows of the settings, or whole."""
    from timm_ext.inference import fitting_size
    from timm_ext.planning import footprint_of

    footprint, window = footprint_of(network), settings.predict.window

    def check(scan: "Prepared") -> None:
        at_once = 1 if window is None else _WINDOWS_AT_ONCE
        voxels = at_once * prod(fitting_size(window or scan.shape, footprint.divisor))
        maps = 3 * 4 * network["out_channels"] * (prod(scan.shape) + prod(scan.grid.input_shape))
        what = "the whole volume" if window is None else f"windows of {edges(window)} voxels"
        with _hint("--set predict.window=[64,64,64] takes windows of that size"):
            check_memory(footprint.inference_bytes(voxels) + maps, f"{scan.id}: prediction of {what}")

    return check


@contextmanager
def _hint(what: str) -> Iterator[None]:
    """Add to a refusal what takes less memory."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{error}; {what}") from error


def edges(values: Iterable[int]) -> str:
    """Return the lengths of a volume's edges for readers."""
    return " × ".join(str(int(value)) for value in values)
