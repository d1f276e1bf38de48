"""Times the forward pass of 3-D networks under `timm_ext.fast_layers` against other programs on the CPU.

    python -m benchmarks.inference benchmarks/results/inference_cpu.json

The unit is plain PyTorch in float32. Rivals: the same in `channels_last_3d`, by `torch.compile`, under
bfloat16 autocast; OpenVINO in float32 and with its hint for bfloat16, and ONNX Runtime, where they are
installed (`pip install openvino onnx onnxruntime`). Every output is compared with float64's before it is
timed. All take turns in one process, in which malloc keeps what is freed, so that ratios come from
neighbouring measurements; medians count. Peak memory of PyTorch's ways is taken in fresh processes. Rows
that the file has from the same code and machine are kept: an interrupted run goes on.
"""

import argparse
import sys
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.inference_rivals import MAKERS, Forward
from benchmarks.machine import peak_bytes
from benchmarks.networks import NETWORKS, check_edge, draw, heads
from benchmarks.rows import Result, Row, peaks, row_parser, summary, time_in_turns
from benchmarks.ways import WAYS

ERROR_BOUNDS = {"float32": 1e-3, "bfloat16": 0.1}  # of the norm of the logits in float64
Edges = tuple[int, ...]
Threads = tuple[int, ...]
SELECTION: dict[str, tuple[Edges, Threads]] = {  # of the committed result
    "isensee2017 16": ((64, 96), (1, 2)),
    "isensee2017 8": ((64, 96), (1, 2)),
    "SegResNet 16": ((64,), (1,)),
    "DynUNet 32-256": ((64,), (1,)),
    "PlainConvUNet 32-256": ((64,), (1,)),
}


def network(name: str) -> nn.Module:
    """A network as it predicts."""
    return NETWORKS[name]().eval()


def expected_logits(model: nn.Module, images: Tensor) -> Tensor:
    """The finest map of logits in float64."""
    with torch.inference_mode():
        expected = heads(model.double()(images.double()))[0].clone()
    model.float()
    return expected


def distance(found: Tensor, expected: Tensor) -> float:
    """Distance of two maps of logits, relative to the norm of the one expected."""
    return float((found.double() - expected).norm() / expected.norm())


def made(name: str, model: nn.Module, images: Tensor) -> Forward | None:
    """A way to the logits, or a word that it is not installed."""
    try:
        return MAKERS[name](model, images)
    except ImportError as error:
        print(f"benchmarks.inference: {name} is left out: {error}", flush=True)
        return None


def measure(options: argparse.Namespace, name: str, edge: int, threads: int) -> Row:
    """Errors, times and ratios to plain PyTorch."""
    torch.set_num_threads(threads)
    model, (images, _) = network(name), draw(1, edge)
    expected = expected_logits(model, images)
    calls = {rival: call for rival in options.rivals if (call := made(rival, model, images))}
    errors = {rival: distance(call(), expected) for rival, call in calls.items()}
    check(name, errors)
    times = time_in_turns(calls, options.rounds, options.seconds)
    return {"errors": errors, **summary(times)}


def check(name: str, errors: dict[str, float]) -> None:
    """Refuse to time what computes something else."""
    bounds = {rival: ERROR_BOUNDS["bfloat16" if "bfloat16" in rival else "float32"] for rival in errors}
    if beyond := {rival: error for rival, error in errors.items() if not error <= bounds[rival]}:
        raise SystemExit(f"benchmarks.inference: {name}: expected errors up to {ERROR_BOUNDS} (got {beyond})")


def print_peak(way: str, name: str, edge: str, batch: str) -> None:
    """Print the peak memory of one way's second pass in bytes; the first one may compile."""
    torch.set_num_threads(1)
    call = MAKERS[way](network(name), draw(int(batch), int(edge))[0])
    call()
    print(peak_bytes(call, "cpu"))


def parse(arguments: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = row_parser(__doc__, list(SELECTION), rounds=15, seconds=10.0)
    parser.add_argument("--edge", type=int, nargs="+", help="of the cubic image")
    parser.add_argument("--rivals", nargs="+", default=list(MAKERS), choices=MAKERS, help="of the plain way")
    options = parser.parse_args(arguments)
    options.rivals = list(dict.fromkeys(["plain", *options.rivals]))
    return options


def main(arguments: list[str]) -> None:
    """Run all rows and write the result after each."""
    if arguments[:1] == ["--peak"]:
        print_peak(*arguments[1:])
        return
    options = parse(arguments)
    result = Result(options.output, options.again)
    ways = [rival for rival in options.rivals if rival in WAYS]
    for name in options.network:
        edges, counts = SELECTION.get(name, ((64,), (1,)))
        for edge in options.edge or edges:
            check_edge(name, edge)
            key = {"network": name, "edge": edge, "batch": 1}
            for threads in options.threads or counts:
                result.add(
                    "rows", {**key, "threads": threads}, partial(measure, options, name, edge, threads)
                )
            result.add("memory", key, partial(peaks, "benchmarks.inference", ways, key))


if __name__ == "__main__":
    main(sys.argv[1:])
