"""Times the forward pass of 3-D networks under `timm_ext.fast_layers` against other programs on the CPU.

    python -m benchmarks.inference

The unit is plain PyTorch in float32. Rivals: the same in `channels_last_3d`, by `torch.compile` where that is
asked for; OpenVINO and ONNX Runtime where they are installed (`pip install openvino onnx onnxruntime`); where
the CPU has instructions for it, bfloat16 autocast and OpenVINO with its hint for bfloat16. Every output is
compared with float64's before it is timed. All take turns in one process, in which malloc keeps what is
freed, so that ratios come from neighbouring measurements; medians count. Peak memory of PyTorch's ways is
taken in fresh processes.

Without options it makes the committed result; rows that the file has from the same code and machine are
kept, so that a run goes on where it was, and may go in parts.
"""

import argparse
import sys
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.inference_rivals import MAKERS, Forward
from benchmarks.machine import peak_bytes
from benchmarks.networks import NETWORKS, check_edge, draw, heads
from benchmarks.result import RESULTS, Result
from benchmarks.rows import (
    Row,
    add_rounds,
    chosen,
    of_memory,
    peaks,
    problems,
    row_parser,
    summary,
    time_in_turns,
)
from benchmarks.ways import WAYS, standard
from timm_ext.layers.half import half_path

ERROR_BOUNDS = {"float32": 1e-3, "bfloat16": 0.1}  # of the norm of the logits in float64
STANDARD = {"edge": 64, "batch": 1, "threads": 1}
SELECTION = [  # of the committed result
    *problems("isensee2017 8", (64, 96), (1,), (2,)),
    *problems("isensee2017 16", (64,), (1,), (2,)),
    *problems("SegResNet 16", (64,), (1,)),
    *problems("DynUNet 32-256", (64,), (1,)),
    *problems("PlainConvUNet 32-256", (64,), (1,)),
]


def predicting(name: str) -> nn.Module:
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


def measure(options: argparse.Namespace, name: str, edge: int, batch: int, threads: int) -> Row:
    """Errors, times and ratios to plain PyTorch."""
    torch.set_num_threads(threads)
    model, (images, _) = predicting(name), draw(batch, edge)
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
    call = MAKERS[way](predicting(name), draw(int(batch), int(edge))[0])
    call()
    print(peak_bytes(call, "cpu"))


def parse(arguments: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = row_parser(__doc__, RESULTS / "inference_cpu.json")
    add_rounds(parser, rounds=15, seconds=10.0)
    rivals = standard(MAKERS, half_path()[0])
    parser.add_argument("--rivals", nargs="+", default=rivals, choices=MAKERS, help="of the plain way")
    options = parser.parse_args(arguments)
    options.rivals = list(dict.fromkeys(["plain", *options.rivals]))
    return options


def main(arguments: list[str]) -> None:
    """Run all rows and write the result after each."""
    if arguments[:1] == ["--peak"]:
        print_peak(*arguments[1:])
        return
    options = parse(arguments)
    keys = chosen(SELECTION, options, STANDARD)
    for key in keys:
        check_edge(key["network"], key["edge"])
    result = Result(options.output, options)
    for key in keys:
        result.add("rows", key, partial(measure, options, *key.values()))
    ways = [rival for rival in options.rivals if rival in WAYS]
    for key in of_memory(keys):
        result.add("memory", key, partial(peaks, "benchmarks.inference", ways, key))


if __name__ == "__main__":
    main(sys.argv[1:])
