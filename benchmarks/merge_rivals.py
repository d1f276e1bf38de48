"""Problems for the merge, the ways to solve them, and the check that all do the same work."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import timm_ext
from timm_ext.merging.bank import empty_matrices
from timm_ext.ops import reference

FORWARD_BOUND = 8 * 2.0**-24  # of Σw|θ|/Σw
BACKWARD_BOUND = 5e-6  # of Σ|g w_t (θ_t - θ*)| / Σw
KERNEL = 27
RIVAL_BOUND = {torch.float32: 1e-3, torch.bfloat16: 0.25, torch.float16: 0.25}  # of plain arithmetic


@dataclass(frozen=True)
class Problem:
    """Inputs; θ and F as matrices and, where segments are few, as one list of [T, n] tensors per layer."""

    theta: Tensor
    fisher: Tensor
    logits: Tensor
    offsets: Tensor
    gradient: Tensor
    layers: list[tuple[Tensor, Tensor]]

    @property
    def traffic(self) -> int:
        """Bytes that a forward and a backward must move at least, each: 2T + 1 rows of P."""
        return (2 * self.theta.shape[0] + 1) * self.theta.shape[1] * self.theta.element_size()


Forward = Callable[[Problem, Tensor], Tensor]


def layer_lengths(elements: int, layers: int = 30) -> list[int]:
    """Lengths of layers that grow like those of a U-Net, adding up to `elements`."""
    shares = [2.0 ** (min(i, layers - 1 - i) / 2) for i in range(layers)]
    lengths = [max(1, int(elements * share / sum(shares))) for share in shares]
    lengths[layers // 2] += elements - sum(lengths)
    return lengths


def make_problem(
    elements: int,
    models: int,
    segments: str,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> Problem:
    """Draw a problem.

    Args:
        elements: P; "kernels" takes the next multiple of 27 below, "unaligned" the next odd number.
        models: T.
        segments: "layers" or "unaligned": 30 of them; "kernels": one ratio per 27 elements. The matrices are
            those of a bank; the rows of "unaligned" ones lie P apart.
        dtype: of the matrices.
        device: of all tensors.
    """
    if segments == "kernels":
        lengths = [KERNEL] * (elements // KERNEL)
        elements = sum(lengths)
    else:
        elements |= segments == "unaligned"
        lengths = layer_lengths(elements)
    generator = torch.Generator(device).manual_seed(0)
    matrices = empty_matrices(2, models, elements, dtype).to(device)
    if segments == "unaligned":
        matrices = matrices[:, :, :elements].contiguous()
    for draw, matrix in zip((torch.randn, torch.rand), matrices, strict=True):
        for row in matrix:
            row.copy_(draw(matrices.shape[2], generator=generator, device=device))
    theta, fisher = matrices[0, :, :elements], matrices[1, :, :elements]
    logits = torch.randn(len(lengths), models, generator=generator, device=device)
    offsets = torch.tensor([0, *lengths], device=device).cumsum(0)
    gradient = torch.randn(elements, generator=generator, device=device).to(dtype)
    few = len(lengths) < 1000
    layers = list(zip(theta.split(lengths, 1), fisher.split(lengths, 1), strict=True)) if few else []
    return Problem(theta, fisher, logits, offsets, gradient, layers)


def fused(p: Problem, logits: Tensor) -> Tensor:
    """Merge by `fused_merge`."""
    return timm_ext.fused_merge(p.theta, p.fisher, logits, p.offsets)


def eager(p: Problem, logits: Tensor) -> Tensor:
    """Merge as one would write it: a sum over the models per layer."""
    ratios = torch.sigmoid(logits)
    merged = []
    for alpha, (theta, fisher) in zip(ratios.unbind(0), p.layers, strict=True):
        weight = alpha.to(theta.dtype)[:, None] * fisher
        merged.append((weight * theta).sum(0) / weight.sum(0))
    return torch.cat(merged)


def modelwise(p: Problem, logits: Tensor) -> Tensor:
    """Merge each layer by adding up the models one by one, as from their own state dicts."""
    ratios = torch.sigmoid(logits).to(p.theta.dtype)
    merged = []
    for alpha, (theta, fisher) in zip(ratios.unbind(0), p.layers, strict=True):
        weights = [a * f for a, f in zip(alpha.unbind(0), fisher.unbind(0), strict=True)]
        terms = [weight * t for weight, t in zip(weights, theta.unbind(0), strict=True)]
        merged.append(sum(terms[1:], terms[0]) / sum(weights[1:], weights[0]))
    return torch.cat(merged)


def foreach(p: Problem, logits: Tensor) -> Tensor:
    """Merge all layers in a few calls per model."""
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


def flat(p: Problem, logits: Tensor) -> Tensor:
    """Merge by one formula over the whole matrices; the ratios are spread out to all elements."""
    ratios = torch.sigmoid(logits).to(p.theta.dtype)
    alpha = ratios.repeat_interleave(p.offsets.diff(), 0, output_size=p.theta.shape[1]).T
    weight = alpha * p.fisher
    return (weight * p.theta).sum(0) / weight.sum(0)


def kernelwise(p: Problem, logits: Tensor) -> Tensor:
    """Merge segments of equal length as `[T, G, 27]`, the ratios broadcast."""
    alpha = torch.sigmoid(logits).to(p.theta.dtype).T[:, :, None]
    theta, fisher = (matrix.unflatten(1, (-1, KERNEL)) for matrix in (p.theta, p.fisher))
    weight = alpha * fisher
    return ((weight * theta).sum(0) / weight.sum(0)).flatten()


def rival_forwards(p: Problem) -> dict[str, Forward]:
    """The ways to write the merge that the problem's segments allow."""
    if not p.layers:
        return {"kernelwise": kernelwise, "flat": flat}
    return {
        "eager": eager,
        "modelwise": modelwise,
        "compiled": torch.compile(eager, dynamic=False),
        "foreach": foreach,
        "flat": flat,
    }


def with_backward(forward: Forward, p: Problem) -> Tensor:
    """The gradient of the logits for the problem's gradient of merged."""
    logits = p.logits.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(forward(p, logits), logits, p.gradient)
    return gradient


def errors(p: Problem, most: int = 1 << 23) -> dict[str, float]:
    """Return the largest errors on the first elements, in units of their bounds."""
    part = _first_elements(p, min(p.theta.shape[1], most))
    lengths = part.offsets.diff()
    theta, fisher, logits = part.theta.double(), part.fisher.double(), part.logits.double()
    wide = Problem(theta, fisher, logits, part.offsets, part.gradient.double(), [])
    merged = fused(part, part.logits).double()
    truth = _reference(wide, logits)
    magnitude = reference.fused_merge(theta.abs(), fisher, logits, part.offsets)
    storage = torch.finfo(p.theta.dtype).eps / 2 if p.theta.dtype != torch.float32 else 0.0
    forward = ((merged - truth).abs() / ((FORWARD_BOUND + storage) * magnitude)).max()

    got = with_backward(fused, part).double()
    expected = with_backward(_reference, wide)
    weight = torch.sigmoid(logits).repeat_interleave(lengths, 0).T * fisher
    terms = (wide.gradient * weight / weight.sum(0) * (theta - truth)).abs()
    rows = torch.repeat_interleave(torch.arange(len(lengths), device=p.theta.device), lengths)
    scale = torch.zeros_like(expected.T).index_add_(1, rows, terms).T.sum(1, keepdim=True)
    backward = ((got - expected).abs() / (BACKWARD_BOUND * scale)).max()
    return {"forward_error": float(forward), "backward_error": float(backward)}


def check(p: Problem) -> dict[str, float]:
    """Return our errors, see `errors`.

    Raises:
        SystemExit: one is beyond its bound, or a rival's forward is not the merge.
    """
    found = errors(p)
    if not max(found.values()) <= 1:
        raise SystemExit(
            f"benchmarks.merge: T={p.theta.shape[0]} P={p.theta.shape[1]}: beyond bounds: {found}"
        )
    expected = fused(p, p.logits).float()
    for name, call in rival_forwards(p).items():
        try:
            error = (call(p, p.logits).float() - expected).abs().max()
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            continue
        if not error <= RIVAL_BOUND[p.theta.dtype]:
            raise SystemExit(f"benchmarks.merge: {name} is off by {float(error)}")
    return found


def _first_elements(p: Problem, elements: int) -> Problem:
    """The problem cut off after some elements; the last segment may get shorter."""
    count = int((p.offsets < elements).sum())
    offsets = torch.cat([p.offsets[:count], p.offsets.new_tensor([elements])])
    matrices = p.theta[:, :elements], p.fisher[:, :elements]
    return Problem(*matrices, p.logits[:count], offsets, p.gradient[:elements], [])


def _reference(p: Problem, logits: Tensor) -> Tensor:
    return reference.fused_merge(p.theta, p.fisher, logits, p.offsets)
