"""The machine that a training is planned for: its kind, its memory, and what of it prepared cases take."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from math import inf, prod
from typing import Literal

import torch

from timm_ext.data.prepare import Prepared
from timm_ext.system.machine import available_memory, total_memory

GIB = 1024**3
_SHARE = {"cpu": 0.25, "gpu": 0.8}
_MOST = {"cpu": 2 * GIB, "gpu": 16 * GIB}
_CPU_FLOPS = 350e9
_HELD = 0.25  # of the memory, by prepared cases


@dataclass(frozen=True)
class Machine:
    """What a step of training may take.

    Attributes:
        kind: whether a CPU or a GPU computes.
        memory: bytes that the machine, or the GPU, has.
        devices: that share a batch.
    """

    kind: Literal["cpu", "gpu"]
    memory: int
    devices: int = 1

    @property
    def step_bytes(self) -> int:
        """Most bytes that a step may take on one device: a power of two, so that like machines plan alike.

        On a CPU, whose processes share the memory, at most a quarter of it and 2 GiB, on a GPU at most four
        fifths of it and 16 GiB.
        """
        own = self.memory / self.devices if self.kind == "cpu" else self.memory
        most = min(own * _SHARE[self.kind], _MOST[self.kind])
        return 1 << (max(int(most), 1).bit_length() - 1)

    @property
    def step_flops(self) -> float:
        """Most floating-point operations of a step: some seconds on a CPU, what memory allows on a GPU."""
        return _CPU_FLOPS if self.kind == "cpu" else inf


def this_machine(accelerator: str = "auto", devices: int = 1) -> Machine:
    """Describe the machine that a training with these settings runs on; torchrun's processes count."""
    if torch.distributed.is_torchelastic_launched():
        devices = int(os.environ["WORLD_SIZE"])
    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        return Machine("gpu", torch.cuda.get_device_properties(0).total_memory, devices)
    return Machine("cpu", total_memory(), devices)


def free_memory(machine: Machine) -> int:
    """Return the bytes that can still be taken now where the machine computes."""
    if machine.kind == "cpu":
        return available_memory()
    free: int = torch.cuda.mem_get_info(0)[0]
    return free


def keep_in_memory(cases: Sequence[Prepared], channels: int, processes: int = 1) -> bool:
    """Tell whether prepared cases are held in memory, a quarter of it at most for all processes together."""
    return processes * _bytes(cases, channels) <= _HELD * total_memory()


def held_bytes(cases: Sequence[Prepared], channels: int, processes: int = 1) -> int:
    """Return the bytes of prepared cases that a process holds."""
    return _bytes(cases, channels) if keep_in_memory(cases, channels, processes) else 0


def _bytes(cases: Sequence[Prepared], channels: int) -> int:
    """Return the bytes of the images (float32) and labels (uint8)."""
    return sum(prod(case.shape) * (4 * channels + case.has_label) for case in cases)
