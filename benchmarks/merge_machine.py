"""Bandwidth of the machine that the merge is timed on, and the merge's memory."""

import ctypes
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import merge_rivals as rivals
from benchmarks.machine import peak_bytes


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
    return round(peak_bytes(lambda: rivals.with_backward(forward, p), p.theta.device.type) / size, 3)


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
