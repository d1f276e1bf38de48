"""Times `conv_weight_grad_square_` against the framework's convolution, example by example, layer by layer.

    python -m benchmarks.conv_square conv_square_cuda.json --device cuda
    python -m benchmarks.conv_square conv_square_cpu.json --base 8 --edge 32 --rounds 3

Layers: all 3³ convolutions of `isensee2017` on 4 × edge³ images, equal ones once. Rivals: the operator; the
weight gradient of each example with `square_accumulate_` for all of them at once; and what the Fisher chooses
(on CUDA by `timm_ext.layers.fused.prefers_fused`). All are float32 in IEEE arithmetic and are checked against
one another before they are timed; they take turns, and medians count.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.machine import code, environment, median_ratio, milliseconds
from timm_ext.files import write_json
from timm_ext.fisher.precision import precise
from timm_ext.layers import fused
from timm_ext.layers.convolution import Geometry
from timm_ext.layers.gradients import ConvolutionWeightGradients, ExampleGradients
from timm_ext.networks import build_network
from timm_ext.ops.fisher import conv_weight_grad_square_

ERROR_BOUND = 2e-5  # of the largest square: two ways to sum in float32


@dataclass(frozen=True)
class Layer:
    """A convolution as the network calls it: channels, edge of the cubic input, taps of an edge, stride."""

    outputs: int
    inputs: int
    edge: int
    kernel: int
    stride: int

    @property
    def out_edge(self) -> int:
        """Edge of the output: the padding is half of the kernel."""
        return (self.edge - 1) // self.stride + 1

    @property
    def flops(self) -> int:
        """Of one example's weight gradient."""
        return 2 * self.outputs * self.inputs * self.kernel**3 * self.out_edge**3


def layers(base: int, edge: int) -> list[Layer]:
    """Return the 3³ convolutions of `isensee2017` with `base` filters on images 4 × edge³, each kind once."""
    found: dict[Layer, None] = {}
    with torch.device("meta"):
        model = build_network("isensee2017", in_channels=4, out_channels=3, base_filters=base).eval()
        image = torch.empty(1, 4, edge, edge, edge)

    def note(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        assert isinstance(module, nn.Conv3d)
        if module.kernel_size[0] == 3:
            sizes = (module.out_channels, module.in_channels, inputs[0].shape[2])
            found[Layer(*sizes, module.kernel_size[0], module.stride[0])] = None

    for module in model.to("meta").modules():
        if isinstance(module, nn.Conv3d):
            module.register_forward_hook(note)
    with torch.no_grad():
        model(image)
    return list(found)


def ways(layer: Layer, batch: int, device: str) -> Iterator[tuple[str, Callable[[Tensor], None]]]:
    """Yield the rivals by name: each adds the squares of a batch to an accumulator."""
    generator = torch.Generator().manual_seed(0)
    input = torch.randn(batch, layer.inputs, *[layer.edge] * 3, generator=generator).to(device)
    grad = torch.randn(batch, layer.outputs, *[layer.out_edge] * 3, generator=generator).to(device)
    weight = torch.randn(layer.outputs, layer.inputs, *[layer.kernel] * 3, generator=generator).to(device)
    stride, padding = (layer.stride,) * 3, (layer.kernel // 2,) * 3
    geometry = Geometry(stride, padding, (1, 1, 1), False, (0, 0, 0), 1)
    gradients = ConvolutionWeightGradients(input, grad, weight, geometry)

    def operator(acc: Tensor) -> None:
        conv_weight_grad_square_(acc, grad, input, stride=stride, padding=padding, dilation=(1, 1, 1))

    yield "operator", operator
    yield "example by example", lambda acc: ExampleGradients.square_into(gradients, acc, 1.0)
    yield "as chosen", lambda acc: gradients.square_into(acc, 1.0)


def measure(layer: Layer, options: argparse.Namespace) -> dict[str, Any]:
    """Return one row of the result: error, times, ratio."""
    shape = (layer.outputs, layer.inputs, *[layer.kernel] * 3)
    calls: dict[str, Callable[[], None]] = {}
    results: dict[str, Tensor] = {}
    for name, way in ways(layer, options.batch, options.device):
        results[name] = torch.zeros(shape, device=options.device)
        way(results[name])
        sums = torch.zeros(shape, device=options.device)
        calls[name] = lambda way=way, sums=sums: way(sums)  # type: ignore[misc]
    expected = results["example by example"]
    error = max(float((found - expected).abs().max() / expected.max()) for found in results.values())
    if not error <= ERROR_BOUND:
        raise SystemExit(f"benchmarks.conv_square: {layer}: further off than {ERROR_BOUND}: {error}")
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(options.rounds):
        for name, call in calls.items():
            times[name].append(milliseconds(call, options.device))
    medians = {name: statistics.median(values) for name, values in times.items()}
    chosen = fused.prefers_fused(1, layer.outputs, layer.inputs * layer.kernel**3, layer.out_edge**3)
    return {
        **vars(layer),
        "batch": options.batch,
        "error": error,
        "prefers_fused": chosen,
        "milliseconds": {name: round(value, 4) for name, value in medians.items()},
        "operator_tflops": round(layer.flops * options.batch / medians["operator"] / 1e9, 2),
        "operator_over_examples": median_ratio(times["operator"], times["example by example"]),
    }


def main(arguments: list[str]) -> None:
    """Run all layers and write the result after each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", type=Path)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--base", type=int, default=16, help="filters of the first level")
    parser.add_argument("--edge", type=int, nargs="+", default=[128, 32])
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args(arguments)
    result: dict[str, Any] = {
        "environment": {**environment(options.device), "code": code()},
        "base": options.base,
        "rows": [],
    }
    with precise("ieee", torch.device(options.device)), torch.no_grad():
        for edge in options.edge:
            for layer in layers(options.base, edge):
                result["rows"].append({"image_edge": edge, **measure(layer, options)})
                print(json.dumps(result["rows"][-1]), flush=True)
                write_json(options.output, result)


if __name__ == "__main__":
    main(sys.argv[1:])
