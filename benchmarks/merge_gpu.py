"""Times `fused_merge` on the current GPU against other ways to write it and against copying the same bytes.

    python benchmarks/merge_gpu.py results.json [--elements 8260000 64000000] [--models 2 5] [--rounds 20]

Rivals: per layer in eager PyTorch, the same compiled, `torch._foreach` over the layers, and one formula over
the flat planes. Each result is checked before it is timed: ours against float64 within the bounds of the
operator, the rivals loosely, so that they do the same work. They take turns in one process; a round is one
CUDA-event timing of a few calls each, and the medians over the rounds count.
"""

import argparse
import json
import platform
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import timm_ext
from timm_ext import reference
from timm_ext.files import write_json

CALLS = 5  # timed together in a round
FORWARD_BOUND = 8 * 2.0**-24  # of Σw|θ|/Σw
BACKWARD_BOUND = 5e-6  # of Σ|g w_t (θ_t - θ*)| / Σw
KERNEL = 27


@dataclass(frozen=True)
class Problem:
    """Inputs on the GPU; θ and F as planes and as one list of [T, n] tensors per layer."""

    theta: Tensor
    fisher: Tensor
    logits: Tensor
    offsets: Tensor
    gradient: Tensor
    layers: list[tuple[Tensor, Tensor]]

    @property
    def traffic(self) -> int:
        """Bytes that a forward and a backward must move at least, each: 2T + 1 planes."""
        return (2 * self.theta.shape[0] + 1) * self.theta.shape[1] * self.theta.element_size()


def layer_lengths(elements: int, layers: int = 30) -> list[int]:
    """Lengths of layers that grow like those of a U-Net, adding up to `elements`."""
    shares = [2.0 ** (min(i, layers - 1 - i) / 2) for i in range(layers)]
    lengths = [max(1, int(elements * share / sum(shares))) for share in shares]
    lengths[layers // 2] += elements - sum(lengths)
    return lengths


def make_problem(
    elements: int, models: int, lengths: list[int], dtype: torch.dtype, *, padded: bool = True
) -> Problem:
    """Draw a problem; padded rows lie 64 elements apart from a multiple of 4 KiB, as in the bank."""
    generator = torch.Generator("cuda").manual_seed(0)
    stride = -(-elements // 1024) * 1024 + 64 if padded else elements

    def plane(draw: Callable[..., Tensor]) -> Tensor:
        storage = torch.empty(models, stride, dtype=dtype, device="cuda")
        for row in storage:
            row.copy_(draw(stride, generator=generator, device="cuda"))
        return storage[:, :elements]

    theta, fisher = plane(torch.randn), plane(torch.rand)
    logits = torch.randn(len(lengths), models, generator=generator, device="cuda")
    offsets = torch.tensor([0, *lengths], device="cuda").cumsum(0)
    gradient = torch.randn(elements, generator=generator, device="cuda").to(dtype)
    few = len(lengths) < 1000
    layers = list(zip(theta.split(lengths, 1), fisher.split(lengths, 1), strict=True)) if few else []
    return Problem(theta, fisher, logits, offsets, gradient, layers)


def fused_forward(p: Problem, logits: Tensor) -> Tensor:
    return timm_ext.fused_merge(p.theta, p.fisher, logits, p.offsets)


def eager_forward(p: Problem, logits: Tensor) -> Tensor:
    """What one would write: a sum over the models per layer."""
    ratios = torch.sigmoid(logits)
    merged = []
    for alpha, (theta, fisher) in zip(ratios.unbind(0), p.layers, strict=True):
        weight = alpha.to(theta.dtype)[:, None] * fisher
        merged.append((weight * theta).sum(0) / weight.sum(0))
    return torch.cat(merged)


def foreach_forward(p: Problem, logits: Tensor) -> Tensor:
    """All layers in a few launches per model."""
    ratios = torch.sigmoid(logits).to(p.theta.dtype)
    numerator: Any = None
    denominator: Any = None
    for t in range(p.theta.shape[0]):
        alphas = list(ratios[:, t].unbind(0))
        weights = torch._foreach_mul([fisher[t] for _, fisher in p.layers], alphas)
        terms = torch._foreach_mul(weights, [theta[t] for theta, _ in p.layers])
        numerator = torch._foreach_add(numerator, terms) if numerator else terms
        denominator = torch._foreach_add(denominator, weights) if denominator else weights
    return torch.cat(torch._foreach_div(numerator, denominator))


def flat_forward(p: Problem, logits: Tensor) -> Tensor:
    """One formula over the flat planes; the ratios are spread out to all elements."""
    ratios = torch.sigmoid(logits).to(p.theta.dtype)
    alpha = ratios.repeat_interleave(p.offsets.diff(), 0, output_size=p.theta.shape[1]).T
    weight = alpha * p.fisher
    return (weight * p.theta).sum(0) / weight.sum(0)


def with_backward(forward: Callable[[Problem, Tensor], Tensor], p: Problem) -> Tensor:
    """The gradient of the logits for the problem's gradient of merged."""
    logits = p.logits.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(forward(p, logits), logits, p.gradient)
    return gradient


def copy_loop(p: Problem) -> Callable[[], Any]:
    """Reads and writes as many bytes as a forward moves."""
    source = torch.zeros(p.traffic // 8, dtype=torch.float32, device="cuda")
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def triad(p: Problem) -> Callable[[], Any]:
    """Return the loop a = b + s·c over as many bytes as a forward moves."""
    a, b, c = torch.zeros(3, p.traffic // 12, dtype=torch.float32, device="cuda")
    return lambda: torch.add(b, c, alpha=3.0, out=a)


def first_elements(p: Problem, elements: int) -> Problem:
    """The problem cut off after some elements; the last segment may get shorter."""
    count = int((p.offsets < elements).sum())
    offsets = torch.cat([p.offsets[:count], p.offsets.new_tensor([elements])])
    planes = p.theta[:, :elements], p.fisher[:, :elements]
    return Problem(*planes, p.logits[:count], offsets, p.gradient[:elements], [])


def reference_forward(p: Problem, logits: Tensor) -> Tensor:
    return reference.fused_merge(p.theta, p.fisher, logits, p.offsets)


def verify(p: Problem) -> dict[str, float]:
    """Return the largest errors on the first 8M elements, in units of their bounds."""
    part = first_elements(p, min(p.theta.shape[1], 1 << 23))
    lengths = part.offsets.diff()
    theta, fisher, logits = part.theta.double(), part.fisher.double(), part.logits.double()
    wide = Problem(theta, fisher, logits, part.offsets, part.gradient.double(), [])
    merged = fused_forward(part, part.logits).double()
    truth = reference_forward(wide, logits)
    magnitude = reference.fused_merge(theta.abs(), fisher, logits, part.offsets)
    storage = torch.finfo(p.theta.dtype).eps / 2 if p.theta.dtype != torch.float32 else 0.0
    forward = ((merged - truth).abs() / ((FORWARD_BOUND + storage) * magnitude)).max()

    got = with_backward(fused_forward, part).double()
    expected = with_backward(reference_forward, wide)
    weight = torch.sigmoid(logits).repeat_interleave(lengths, 0).T * fisher
    terms = (wide.gradient * weight / weight.sum(0) * (theta - truth)).abs()
    rows = torch.repeat_interleave(torch.arange(len(lengths), device="cuda"), lengths)
    scale = torch.zeros_like(expected.T).index_add_(1, rows, terms).T.sum(1, keepdim=True)
    backward = ((got - expected).abs() / (BACKWARD_BOUND * scale)).max()
    torch.cuda.empty_cache()
    return {"forward_error": float(forward), "backward_error": float(backward)}


def event_milliseconds(call: Callable[[], Any]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(CALLS):
        call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / CALLS


def time_rivals(rivals: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float | None]:
    """Median milliseconds of each rival; None for one that does not fit in memory."""
    times: dict[str, list[float]] = {}
    for name, call in rivals.items():
        try:
            event_milliseconds(call)
            times[name] = []
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
    for _ in range(rounds):
        for name in times:
            times[name].append(event_milliseconds(rivals[name]))
    return {name: statistics.median(times[name]) if name in times else None for name in rivals}


def rival_forwards(p: Problem) -> dict[str, Callable[[Problem, Tensor], Tensor]]:
    """The ways to write the merge that the problem's segments allow."""
    if not p.layers:
        return {"flat": flat_forward}
    return {
        "eager": eager_forward,
        "compiled": torch.compile(eager_forward, dynamic=False),
        "foreach": foreach_forward,
        "flat": flat_forward,
    }


def make_rivals(p: Problem) -> dict[str, Callable[[], Any]]:
    """Every way to do the work, and the loops that bound it."""
    out = torch.empty(p.theta.shape[1], dtype=p.theta.dtype, device="cuda")
    rows = torch.log(torch.sigmoid(p.logits))
    forward = torch.ops.timm_ext.fused_merge.out
    backward = torch.ops.timm_ext.fused_merge_backward_log_weight
    rivals: dict[str, Callable[[], Any]] = {
        "copy": copy_loop(p),
        "triad": triad(p),
        "forward": lambda: timm_ext.fused_merge(p.theta, p.fisher, p.logits, p.offsets, out=out),
        "forward_kernel": lambda: forward(p.theta, p.fisher, rows, p.offsets, out=out),
        "backward_kernel": lambda: backward(p.gradient, p.theta, p.fisher, rows, p.offsets),
        "forward_backward": lambda: with_backward(fused_forward, p),
    }
    for name, call in rival_forwards(p).items():
        rivals[f"{name}_forward"] = partial(call, p, p.logits)
        rivals[f"{name}_forward_backward"] = partial(with_backward, call, p)
    return rivals


def check_rivals(p: Problem) -> None:
    """Stop when a rival's forward is not the merge; in half precision theirs is coarse."""
    bound = 1e-3 if p.theta.dtype == torch.float32 else 0.25
    expected = fused_forward(p, p.logits).float()
    for name, call in rival_forwards(p).items():
        try:
            error = (call(p, p.logits).float() - expected).abs().max()
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            continue
        if not error <= bound:
            raise SystemExit(f"merge_gpu: {name} is off by {float(error)}")


def extra_memory(p: Problem, call: Callable[[Problem, Tensor], Tensor]) -> float | None:
    """Peak memory of a forward and backward beyond what was there, in units of the output."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    try:
        with_backward(call, p)
        torch.cuda.synchronize()
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return None
    peak = torch.cuda.max_memory_allocated() - before
    return round(peak / (p.theta.shape[1] * p.theta.element_size()), 3)


def measure(elements: int, models: int, segments: str, dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    """One row of the result: errors, times, fractions of the copy bandwidth, and memory."""
    torch.compiler.reset()  # else torch.compile gives up after a few shapes
    if segments == "unaligned":
        elements |= 1  # rows of contiguous planes then start off a vector
    lengths = layer_lengths(elements)
    if segments == "kernels":
        lengths = [KERNEL] * (elements // KERNEL)
        elements = sum(lengths)
    p = make_problem(elements, models, lengths, dtype, padded=segments != "unaligned")
    errors = verify(p)
    if max(errors.values()) > 1:
        raise SystemExit(f"merge_gpu: P={elements} T={models} {segments} {dtype}: beyond the bound: {errors}")
    check_rivals(p)
    memory = {"fused": extra_memory(p, fused_forward)}
    memory |= {name: extra_memory(p, call) for name, call in rival_forwards(p).items()}
    times = time_rivals(make_rivals(p), rounds)
    return {
        "elements": elements,
        "models": models,
        "segments": segments,
        "dtype": str(dtype).removeprefix("torch."),
        **errors,
        "milliseconds": times,
        "copy_gigabytes_per_second": p.traffic / times["copy"] / 1e6 if times["copy"] else None,
        "forward_of_copy": _ratio(times["copy"], times["forward_kernel"]),
        "backward_of_copy": _ratio(times["copy"], times["backward_kernel"]),
        "extra_memory_of_output": memory,
        **speedups(times),
    }


def speedups(times: dict[str, float | None]) -> dict[str, float | None]:
    """How many times longer each rival takes than `fused_merge`."""
    return {
        f"{name}_speedup": _ratio(times[name], times[ours])
        for ours in ("forward", "forward_backward")
        for name in times
        if name != ours and name.endswith(f"_{ours}")
    }


def _ratio(numerator: float | None, denominator: float | None) -> float | None:
    return None if numerator is None or denominator is None else round(numerator / denominator, 3)


def environment() -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(0)
    return {
        "gpu": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "timm_ext": timm_ext.build_info(),
    }


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", type=Path)
    parser.add_argument("--elements", type=int, nargs="+", default=[1_000_000, 8_260_000, 64_000_000])
    parser.add_argument("--models", type=int, nargs="+", default=[2, 3, 5, 8])
    parser.add_argument(
        "--dtypes", nargs="+", default=["float32"], choices=["float32", "bfloat16", "float16"]
    )
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        raise SystemExit("merge_gpu: a GPU is needed (torch finds none)")
    rows = []
    for dtype in options.dtypes:
        for elements in options.elements:
            for models in options.models:
                for segments in ("layers", "kernels", "unaligned"):
                    row = measure(elements, models, segments, getattr(torch, dtype), options.rounds)
                    rows.append(row)
                    print(json.dumps(row), flush=True)
                    torch.cuda.empty_cache()
    write_json(options.output, {"environment": environment(), "rows": rows})


if __name__ == "__main__":
    main(sys.argv[1:])
