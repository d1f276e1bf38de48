"""Clocks, peak memory and a description of the machine that something is timed on."""

import ctypes
import hashlib
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import timm_ext
from timm_ext.layers.half import half_path
from timm_ext.ops.memory import release_memory
from timm_ext.system.environment import environment as base_environment

CALLS_ON_GPU = 5  # timed together


def milliseconds(call: Callable[[], Any], device: str) -> float:
    """Time of one call; on a GPU the mean over a few, by CUDA events."""
    if device == "cpu":
        begin = time.perf_counter()
        call()
        return (time.perf_counter() - begin) * 1e3
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(CALLS_ON_GPU):
        call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / CALLS_ON_GPU


def median_ratio(one: Sequence[float], other: Sequence[float]) -> float:
    """Median over the rounds of one time over another of the same round."""
    return round(statistics.median(a / b for a, b in zip(one, other, strict=False)), 3)


def peak_bytes(call: Callable[[], Any], device: str) -> int:
    """Peak memory of a call beyond what is there."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL(None).malloc_trim(0)  # what is free and still resident would not be counted
    release_memory()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = _memory("VmRSS")
    call()
    return _memory("VmHWM") - before


def _memory(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) * 1024


def environment(device: str) -> dict[str, Any]:
    """Versions and machine."""
    build = {name: fact for name, fact in timm_ext.build_info().items() if name != "library"}  # a path
    found: dict[str, Any] = {**base_environment(), "cores": os.cpu_count(), "build": build}
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "gpu": properties.name,
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "cuda": torch.version.cuda,
        }
    elif platform.system() == "Linux":
        numbers = re.findall(
            r"^(?:cpu family|model)\s*: (\d+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE
        )
        found |= {"cpu_model": "-".join(numbers[:2]), "bfloat16": half_path()[0]}
        pages = Path("/sys/kernel/mm/transparent_hugepage/enabled")
        found["transparent_huge_pages"] = pages.read_text().strip() if pages.exists() else None
    return found


def code() -> str:
    """Hash of the package as it runs: its Python files and its library."""
    folder = Path(timm_ext.__file__).parent
    digest = hashlib.sha256()
    for path in sorted([*folder.rglob("*.py"), *folder.glob("*.so")]):
        digest.update(
            f"{path.relative_to(folder)} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode()
        )
    return digest.hexdigest()[:12]
