"""Clocks, memory and bandwidth of the machine that the merge is timed on."""

import ctypes
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import timm_ext
from benchmarks import merge_rivals as rivals
from timm_ext.study.collect import environment as base_environment

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


def copy_loops(p: rivals.Problem) -> dict[str, Callable[[], Any]]:
    """Copy and triad over as many bytes as a forward moves, by PyTorch."""
    source = torch.zeros(p.traffic // 8, dtype=torch.float32, device=p.theta.device)
    target = torch.empty_like(source)
    a, b, c = torch.zeros(3, p.traffic // 12, dtype=torch.float32, device=p.theta.device)
    return {"loop_copy": lambda: target.copy_(source), "triad": lambda: torch.add(b, c, alpha=3.0, out=a)}


class Bandwidth:
    """The loops of bandwidth.c, compiled for this CPU; none where there is no C compiler."""

    def __init__(self) -> None:
        compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
        if compiler is None:
            raise SystemExit("benchmarks.merge: a C compiler is needed for the bandwidth loops (set CC)")
        source = Path(__file__).with_name("bandwidth.c")
        with tempfile.TemporaryDirectory() as folder:
            library = Path(folder) / "bandwidth.so"
            flags = ["-O3", "-march=native", "-fopenmp", "-shared", "-fPIC"]
            subprocess.run([compiler, *flags, "-o", library, source], check=True)
            self.library = ctypes.CDLL(str(library))

    def loops(self, p: rivals.Problem, threads: int) -> dict[str, Callable[[], Any]]:
        """The sum over the same rows, with stores through and past the caches, and STREAM's triad."""
        models, elements = p.theta.shape
        stride, itemsize = p.theta.stride(0), p.theta.element_size()
        words = elements * itemsize // 4
        out = torch.empty(words, dtype=torch.float32)
        rows = ctypes.c_void_p(p.theta.data_ptr())  # θ and F are one block
        shape = [ctypes.c_int64(n) for n in (stride * itemsize // 4, 2 * models, words)]
        threads_ = ctypes.c_int(threads)
        # Not torch.zeros, whose memory may be aligned to 16 bytes only.
        streams = [torch.empty(p.traffic // 12, dtype=torch.float32).fill_(1.0) for _ in range(3)]

        def sum_rows(streamed: int) -> None:
            to = ctypes.c_void_p(out.data_ptr())
            self.library.sum_rows(rows, *shape, to, ctypes.c_int(streamed), threads_)

        def triad() -> None:
            pointers = [ctypes.c_void_p(stream.data_ptr()) for stream in streams]
            self.library.triad(*pointers, ctypes.c_int64(streams[0].numel()), threads_)

        return {"loop_stored": lambda: sum_rows(0), "loop_streamed": lambda: sum_rows(1), "triad": triad}


def peak_memory(p: rivals.Problem, forward: rivals.Forward) -> float:
    """Peak memory of a forward and backward beyond what is there, in units of the output."""
    size = p.theta.shape[1] * p.theta.element_size()
    if p.theta.is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        rivals.with_backward(forward, p)
        return round((torch.cuda.max_memory_allocated() - before) / size, 3)
    ctypes.CDLL(None).malloc_trim(0)  # what is free and still resident would not be counted
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = _memory("VmRSS")
    rivals.with_backward(forward, p)
    return round((_memory("VmHWM") - before) / size, 3)


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
        pages = Path("/sys/kernel/mm/transparent_hugepage/enabled")
        found["transparent_huge_pages"] = pages.read_text().strip() if pages.exists() else None
    return found


def main(arguments: list[str]) -> None:
    """Print the peak memory of one rival: elements models segments rival dtype device."""
    elements, models, segments, name, dtype, device = arguments
    torch.set_num_threads(1)
    small = rivals.make_problem(27_000, int(models), segments, dtype=getattr(torch, dtype), device=device)
    p = rivals.make_problem(int(elements), int(models), segments, dtype=getattr(torch, dtype), device=device)
    call = {"fused": rivals.fused, **rivals.rival_forwards(p)}[name]
    if name == "compiled":
        rivals.with_backward(call, p)  # the compiler's own memory is not the merge's
    else:
        rivals.with_backward(call, small)
    print(peak_memory(p, call))


if __name__ == "__main__":
    main(sys.argv[1:])
