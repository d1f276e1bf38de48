"""Devices and processes of a run, through Lightning Fabric."""

import atexit
import ctypes
import gc
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from lightning_fabric import Fabric
from lightning_fabric.utilities.exceptions import MisconfigurationException
from torch import nn

from timm_ext.errors import InputError
from timm_ext.layers.half import half_path
from timm_ext.training.settings import TrainSettings


def launch(settings: TrainSettings) -> Fabric:
    """Start Fabric on the devices of the settings, or as one of torchrun's processes.

    Processes speak gloo on the CPU and NCCL on GPUs.

    Raises:
        InputError: the devices or the precision are not to be had, or the batch cannot be dealt out equally.
    """
    devices, nodes = settings.devices, 1
    if torch.distributed.is_torchelastic_launched():
        devices = int(os.environ["LOCAL_WORLD_SIZE"])
        nodes = int(os.environ["WORLD_SIZE"]) // devices
    world = devices * nodes
    if settings.batch_size % world:
        raise InputError(
            f"training: batch_size must be a multiple of the {world} processes (got {settings.batch_size})"
        )
    check_precision(settings)
    try:
        fabric = Fabric(
            accelerator=settings.accelerator,
            devices=devices,
            num_nodes=nodes,
            precision=_arithmetic(settings),
            strategy="ddp" if world > 1 else "auto",
        )
        started = torch.distributed.is_initialized()
        fabric.launch()
    except (MisconfigurationException, RuntimeError, ValueError) as error:
        raise InputError(
            f"training: cannot use accelerator {settings.accelerator!r} with {devices} devices and precision "
            f"{settings.precision!r} ({' '.join(str(error).split())})"
        ) from error
    if torch.distributed.is_initialized() and not started:
        atexit.register(_leave_processes)
    if fabric.device.type == "cpu":
        keep_freed_memory()
    return fabric


def check_precision(settings: TrainSettings) -> None:
    """Refuse float16 on a CPU, where Fabric would take bfloat16 instead.

    Raises:
        InputError: as said.
    """
    if _on_cpu(settings) and settings.precision == "16-mixed":
        raise InputError(
            "training: expected a GPU for precision 16-mixed (got a CPU: use 32-true, or bf16-mixed for "
            "bfloat16)"
        )


def _arithmetic(settings: TrainSettings) -> Literal["32-true", "bf16-mixed", "16-mixed"]:
    """Return the precision, float32 with a warning for bfloat16 on a CPU that is slower in it."""
    path, reason = half_path()
    if settings.precision != "bf16-mixed" or not _on_cpu(settings) or path != "float32":
        return settings.precision
    warnings.warn(f"training: precision bf16-mixed is computed in float32 here: {reason}", stacklevel=3)
    return "32-true"


def _on_cpu(settings: TrainSettings) -> bool:
    gpu = torch.cuda.is_available() or torch.backends.mps.is_available()
    return settings.accelerator == "cpu" or (settings.accelerator == "auto" and not gpu)


def keep_freed_memory() -> bool:
    """Let malloc keep freed memory for the rest of the process; tell whether it can be told so (glibc).

    A training step frees what the next one takes again. Left alone, malloc gives blocks above 32 MiB back to
    the kernel, which clears every page of them anew.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    trim_threshold, mmap_max = -1, -4  # of malloc.h: never trim, never map single blocks
    return mallopt is not None and bool(mallopt(trim_threshold, -1)) and bool(mallopt(mmap_max, 0))


def _leave_processes() -> None:
    """End the process group while Python still runs.

    gloo's threads hold finished work whose tensors they free at the end; one that needs the interpreter after
    its end aborts the process.
    """
    gc.collect()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@contextmanager
def reproducible(device: torch.device) -> Iterator[None]:
    """Choose reproducible cuDNN kernels and give the caller back its random state afterwards."""
    before = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = before


@contextmanager
def only_trained(model: nn.Module, trained: list[nn.Parameter]) -> Iterator[None]:
    """Let only these parameters require gradients for the length of the block."""
    before = {parameter: parameter.requires_grad for parameter in model.parameters()}
    chosen = set(trained)
    for parameter in before:
        parameter.requires_grad_(parameter in chosen)
    try:
        yield
    finally:
        for parameter, required in before.items():
            parameter.requires_grad_(required)


def is_first_process() -> bool:
    """Tell whether this process is the one that writes files."""
    return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
