"""Times the merge of each instruction set beside the others, each in a process of its own, in turns."""

import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch

import timm_ext
from benchmarks import merge_rivals as rivals
from benchmarks.machine import median_ratio, milliseconds

KERNELS = ("forward", "backward")


class Worker:
    """A process that times the kernels of one instruction set on request."""

    def __init__(self, isa: str, elements: int, models: int, segments: str, threads: int) -> None:
        arguments = [str(elements), str(models), segments, str(threads)]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.merge_isa", *arguments],
            env={**os.environ, "TIMM_EXT_ISA": isa},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def time(self, kernel: str) -> float:
        """Milliseconds of one call."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(kernel, file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"benchmarks.merge: the process of {self._process.args!r} has ended")
        return float(line)

    def close(self) -> None:
        """End the process."""
        self._process.communicate()


def isa_row(elements: int, models: int, segments: str, threads: int, rounds: int) -> dict[str, Any]:
    """Median milliseconds of each instruction set, and medians of its ratios to the widest one."""
    isas = timm_ext.build_info()["isa_built"]
    workers = {isa: Worker(isa, elements, models, segments, threads) for isa in isas}
    times: dict[str, dict[str, list[float]]] = {k: {isa: [] for isa in isas} for k in KERNELS}
    for kernel, of_isa in times.items():
        for _ in range(rounds):
            for isa, worker in workers.items():
                of_isa[isa].append(worker.time(kernel))
    for worker in workers.values():
        worker.close()
    row: dict[str, Any] = {"elements": elements, "models": models, "segments": segments, "threads": threads}
    for kernel, of_isa in times.items():
        row[f"{kernel}_milliseconds"] = {isa: round(statistics.median(v), 3) for isa, v in of_isa.items()}
        row[f"{kernel}_over_{isas[-1]}"] = {
            isa: median_ratio(of_isa[isa], of_isa[isas[-1]]) for isa in isas[:-1]
        }
    return row


def serve(elements: int, models: int, segments: str, threads: int) -> None:
    """Answer each line of the input, a kernel's name, with its time."""
    torch.set_num_threads(threads)
    p = rivals.make_problem(elements, models, segments)
    out = torch.empty_like(p.gradient)
    rows = torch.ops.timm_ext.log_weights(p.logits, "sigmoid")
    forward = torch.ops.timm_ext.fused_merge.out
    backward = torch.ops.timm_ext.fused_merge_backward_log_weight
    calls: dict[str, Callable[[], Any]] = {
        "forward": lambda: forward(p.theta, p.fisher, rows, p.offsets, out=out),
        "backward": lambda: backward(p.gradient, p.theta, p.fisher, rows, p.offsets),
    }
    for line in sys.stdin:
        call = calls[line.strip()]
        call()  # its own memory in the caches, not the other's
        print(milliseconds(call, "cpu"), flush=True)


if __name__ == "__main__":
    serve(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
