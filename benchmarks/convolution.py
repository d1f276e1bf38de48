"""Times the convolutions of the Fisher's pass on the CPU, layer by layer, beside the framework's own.

    python -m benchmarks.convolution benchmarks/results/convolution_cpu.json

Layers: all 3³ convolutions of `isensee2017` on 4 × edge³ images in float32, equal ones once, and their way
back to the input's gradient; those behind nearest-neighbour upsampling together with it, too. Rivals: what
PyTorch takes, and oneDNN by force. All are checked against float64 before they are timed. A round visits
every layer once, so that weights and images come from far memory as in a pass of the network, and each time
another of the ways is the first to fetch them; medians count.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.conv_square import Layer, layers
from benchmarks.machine import code, environment, median_ratio, milliseconds
from timm_ext.files import write_json
from timm_ext.layers.convolution import Geometry, forward_way, gradient_way, upsampled_gradient
from timm_ext.ops.upsampled_conv3d import neighbour_sums3d, upsampled_conv3d

ERROR_BOUND = 1e-5  # of the largest element
OURS = "timm_ext"

Calls = dict[str, Callable[[], Tensor]]


def forwards(geometry: Geometry, input: Tensor, weight: Tensor) -> Calls:
    """Return the ways to the output."""
    arguments = geometry.stride, geometry.padding, geometry.dilation
    return {
        OURS: lambda: geometry.forward(input, weight, None),
        "PyTorch": lambda: torch.conv3d(input, weight, None, *arguments),
        "oneDNN": lambda: torch.mkldnn_convolution(
            input, weight, None, geometry.padding, geometry.stride, geometry.dilation, 1
        ),
    }


def gradients(geometry: Geometry, grad: Tensor, input: Tensor, weight: Tensor) -> Calls:
    """Return the ways to the input's gradient."""
    return {
        OURS: lambda: geometry.input_gradient(grad, input, weight),
        "PyTorch": lambda: geometry._backward(grad, input, weight, (True, False, False))[0],
        "oneDNN": lambda: geometry._onednn_transposed(grad, input.shape[2:], weight),
    }


def check(name: str, calls: Calls, exact: Tensor) -> dict[str, float]:
    """Return the largest error of each way, relative to the largest element."""
    errors = {way: float((call() - exact).abs().max() / exact.abs().max()) for way, call in calls.items()}
    if not max(errors.values()) <= ERROR_BOUND:
        raise SystemExit(f"benchmarks.convolution: {name}: further off than {ERROR_BOUND}: {errors}")
    return errors


class Case:
    """One layer, forward or back: what is called, and the times so far."""

    def __init__(self, row: dict[str, Any], calls: Calls, exact: Tensor):
        errors = check(f"{row['pass']} of {row}", calls, exact)
        self._row = row | {"errors": errors}
        self._calls = calls
        self._times: dict[str, list[float]] = {name: [] for name in calls}

    def time(self, turn: int) -> None:
        """Call every way once, in another order each turn."""
        names = list(self._calls)
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            self._times[name].append(milliseconds(self._calls[name], "cpu"))

    def row(self) -> dict[str, Any]:
        """Return medians, and the rivals' times over ours."""
        medians = {name: round(statistics.median(values), 4) for name, values in self._times.items()}
        rivals = [name for name in self._times if name != OURS]
        over = {name: median_ratio(self._times[name], self._times[OURS]) for name in rivals}
        return self._row | {"milliseconds": medians, "over_ours": over}


def cases(layer: Layer, batch: int) -> list[Case]:
    """Return a layer's forward and way back."""
    generator = torch.Generator().manual_seed(0)
    input = torch.randn(batch, layer.inputs, *[layer.edge] * 3, generator=generator)
    grad = torch.randn(batch, layer.outputs, *[layer.out_edge] * 3, generator=generator)
    weight = torch.randn(layer.outputs, layer.inputs, *[layer.kernel] * 3, generator=generator)
    geometry = Geometry((layer.stride,) * 3, (layer.kernel // 2,) * 3, (1, 1, 1), False, (0, 0, 0), 1)
    wide = input.double(), weight.double()
    exact = geometry.forward(*wide, None), geometry.input_gradient(grad.double(), *wide)
    way = forward_way(geometry, input.shape, weight.shape)
    way_back = gradient_way(geometry, grad.shape, input.shape, weight.shape)[0]
    sizes = vars(layer) | {"batch": batch}
    return [
        Case(sizes | {"pass": "forward", "way": way}, forwards(geometry, input, weight), exact[0]),
        Case(sizes | {"pass": "back", "way": way_back}, gradients(geometry, grad, input, weight), exact[1]),
    ]


def upsampled_cases(layer: Layer, batch: int) -> list[Case]:
    """Return a layer's forward and way back together with the upsampling before it."""
    generator = torch.Generator().manual_seed(0)
    small, large = [layer.edge // 2] * 3, [layer.edge] * 3
    input = torch.randn(batch, layer.inputs, *small, generator=generator)
    grad = torch.randn(batch, layer.outputs, *large, generator=generator)
    weight = torch.randn(layer.outputs, layer.inputs, *[layer.kernel] * 3, generator=generator)
    geometry = Geometry((1, 1, 1), (1, 1, 1), (1, 1, 1), False, (0, 0, 0), 1)

    def upsample(x: Tensor) -> Tensor:
        return functional.interpolate(x, scale_factor=2)

    def halve(gradient: Tensor) -> Tensor:
        halved: Tensor = torch.ops.aten.upsample_nearest3d_backward(gradient, large, input.shape)
        return halved

    def plain_back(grad: Tensor, weight: Tensor) -> Tensor:
        like = grad.new_empty(batch, layer.inputs, *large)
        return halve(geometry._backward(grad, like, weight, (True, False, False))[0])

    there: Calls = {
        OURS: lambda: upsampled_conv3d(input, weight),
        "PyTorch": lambda: torch.conv3d(upsample(input), weight, padding=1),
        "oneDNN": lambda: geometry._onednn(upsample(input), weight, None),
    }
    back: Calls = {
        OURS: lambda: upsampled_gradient(neighbour_sums3d(grad), weight),
        "PyTorch": lambda: plain_back(grad, weight),
        "oneDNN": lambda: halve(geometry._onednn_transposed(grad, large, weight)),
    }
    exact = torch.conv3d(upsample(input.double()), weight.double(), padding=1)
    exact_back = plain_back(grad.double(), weight.double())
    sizes = vars(layer) | {"batch": batch, "way": "upsampled"}
    return [
        Case(sizes | {"pass": "forward"}, there, exact),
        Case(sizes | {"pass": "back"}, back, exact_back),
    ]


def follows_upsampling(layer: Layer) -> bool:
    """Tell whether a decoder level has such a layer behind its upsampling: it halves the channels."""
    return layer.stride == 1 and layer.inputs == 2 * layer.outputs


def main(arguments: list[str]) -> None:
    """Time all layers and write the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", type=Path)
    parser.add_argument("--base", type=int, nargs="+", default=[8, 16], help="filters of the first level")
    parser.add_argument("--edge", type=int, default=32)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    result: dict[str, Any] = {
        "environment": {**environment("cpu"), "code": code()},
        "edge": options.edge,
        "threads": options.threads,
        "rows": [],
    }
    with torch.no_grad():
        for base in options.base:
            kinds = layers(base, options.edge)
            found = [case for layer in kinds for case in cases(layer, options.batch)]
            for layer in filter(follows_upsampling, kinds):
                found += upsampled_cases(layer, options.batch)
            for turn in range(options.rounds):
                for case in found:
                    case.time(turn)
            for case in found:
                result["rows"].append({"base": base, **case.row()})
                print(json.dumps(result["rows"][-1]), flush=True)
            write_json(options.output, result)


if __name__ == "__main__":
    main(sys.argv[1:])
