"""Memory that commands reckon before they take it, with what takes less."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from timm_ext.config import RunSettings
    from timm_ext.data.prepare import Prepared
    from timm_ext.planning import Machine, TrainingPlan

_WINDOWS_AT_ONCE = 4  # that prediction takes


def check_training_memory(
    plan: "TrainingPlan", parts: "Sequence[Sequence[Prepared]]", machine: "Machine", channels: int
) -> None:
    """Refuse a training whose steps or data memory does not hold.

    Raises:
        InputError: as said.
    """
    from timm_ext.errors import InputError
    from timm_ext.planning import free_memory, held_bytes
    from timm_ext.system.machine import check_memory

    data = [case for part in parts for case in part]
    needed = plan.step_bytes + (held_bytes(data, channels, machine.devices) if machine.kind == "cpu" else 0)
    what = f"training: {plan.batch_size} examples of {edges(plan.size)} voxels"
    try:
        check_memory(needed, what, available=free_memory(machine))
    except InputError as error:
        divisor = plan.footprint.divisor
        smaller = ",".join(str(max(edge // 2 // divisor, 1) * divisor) for edge in plan.size)
        raise InputError(
            f"{error}; --set train.patch=[{smaller}] or --set train.batch_size=1 takes less"
        ) from error


def check_fisher_memory(
    settings: "RunSettings", cases: "Sequence[Prepared]", network: Mapping[str, Any]
) -> None:
    """Refuse a Fisher of examples that memory does not hold.

    Raises:
        InputError: as said.
    """
    from math import prod

    from timm_ext.errors import InputError
    from timm_ext.inference import fitting_size
    from timm_ext.planning import footprint_of, held_bytes
    from timm_ext.system.machine import check_memory

    footprint, patch = footprint_of(network), settings.fisher.patch
    voxels = max(prod(patch or fitting_size(case.shape, footprint.divisor)) for case in cases)
    needed = footprint.step_bytes(voxels * settings.fisher.batch_size) + held_bytes(
        cases, network["in_channels"]
    )
    try:
        check_memory(
            needed, "fisher: " + ("whole volumes" if patch is None else f"a patch of {edges(patch)}")
        )
    except InputError as error:
        raise InputError(
            f"{error}; --set fisher.patch=[64,64,64] takes patches of that size, --set fisher.batch_size=1 "
            "one at a time"
        ) from error


def within_memory(settings: "RunSettings", network: Mapping[str, Any]) -> "Callable[[Prepared], None]":
    """Return what refuses a scan that memory does not hold in the windows of the settings, or whole."""
    from math import prod

    from timm_ext.errors import InputError
    from timm_ext.inference import fitting_size
    from timm_ext.planning import footprint_of
    from timm_ext.system.machine import check_memory

    footprint, window = footprint_of(network), settings.predict.window

    def check(scan: "Prepared") -> None:
        at_once = 1 if window is None else _WINDOWS_AT_ONCE
        voxels = at_once * prod(fitting_size(window or scan.shape, footprint.divisor))
        maps = 3 * 4 * network["out_channels"] * (prod(scan.shape) + prod(scan.grid.input_shape))
        what = "the whole volume" if window is None else f"windows of {edges(window)} voxels"
        try:
            check_memory(footprint.inference_bytes(voxels) + maps, f"{scan.id}: prediction of {what}")
        except InputError as error:
            raise InputError(
                f"{error}; --set predict.window=[64,64,64] takes windows of that size"
            ) from error

    return check


def edges(values: Iterable[int]) -> str:
    """Return the lengths of a volume's edges for readers."""
    return " × ".join(str(int(value)) for value in values)
