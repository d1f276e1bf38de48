"""Inputs of the merge for the tests of the operator, and the error bounds they are held to."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from timm_ext.ops import reference

UNIT = 2.0**-24  # unit roundoff of float32

# Error against float64, in units of the named scale. Every entry says why it is not smaller.
FORWARD_BOUND = {
    # Of Σw|θ|/Σw. The worst of 3·10^7 elements is 3.9; a different summation order may cost some more.
    torch.float32: 8 * UNIT,
    # The result is rounded once more, to 8 and 11 bits.
    torch.bfloat16: 8 * UNIT + 2.0**-8,
    torch.float16: 8 * UNIT + 2.0**-11,
    # As float32, with the double's unit; the oracle itself is no better.
    torch.float64: 16 * 2.0**-53,
}
BACKWARD_BOUND = {
    # Of Σ|terms| for the logits, of the entry's own scale for the matrices: lanes of up to 32 float32 terms.
    torch.float32: 5e-6,
    torch.bfloat16: 2.0**-8,
    torch.float16: 2.0**-10,
    torch.float64: 1e-13,
}


@dataclass(frozen=True)
class Sample:
    """One way to call the merge."""

    name: str
    models: int = 2
    lengths: tuple[int, ...] = (3, 700, 40)
    dtype: torch.dtype = torch.float32
    weighted: bool = True
    mixing: str = "sigmoid"
    padding: int = 0  # extra elements between rows
    groups: tuple[int, ...] | None = None

    @property
    def elements(self) -> int:
        return sum(self.lengths)


_PLAIN = Sample("two models")
SAMPLES = [
    _PLAIN,
    Sample("one model", models=1),
    Sample("three models, padded rows", models=3, padding=23),
    Sample("four models, softmax", models=4, mixing="softmax"),
    Sample("five models, ratios", models=5, mixing="ratios"),
    Sample("nine models", models=9, lengths=(5, 100)),
    Sample("no fisher", models=3, weighted=False, padding=1),
    Sample("segments share rows", models=3, lengths=(8, 1, 90, 17), groups=(1, 0, 1, 2)),
    Sample("a segment over several blocks", models=2, lengths=(17, 40_000, 3, 16_000)),
    Sample("a segment per element", models=3, lengths=(1,) * 65),
    Sample("kernels of 27 elements", models=2, lengths=(27,) * 40),
    Sample("one element", lengths=(1,)),
    Sample("nothing", lengths=()),
    replace(_PLAIN, name="float64", dtype=torch.float64, models=3),
    replace(_PLAIN, name="bfloat16", dtype=torch.bfloat16, models=3, padding=5),
    replace(_PLAIN, name="float16", dtype=torch.float16, models=5),
]


@dataclass
class Inputs:
    """Arguments of `fused_merge`."""

    theta: Tensor
    fisher: Tensor | None
    logits: Tensor
    offsets: Tensor
    mixing: str
    groups: Tensor | None

    def arguments(self) -> tuple[tuple[Tensor | None, ...], dict[str, object]]:
        return (self.theta, self.fisher, self.logits, self.offsets), {
            "mixing": self.mixing,
            "groups": self.groups,
        }

    def double(self) -> "Inputs":
        """The same values in float64, without padding, on the CPU."""

        def wide(tensor: Tensor) -> Tensor:
            return tensor.detach().cpu().double().contiguous()

        fisher = None if self.fisher is None else wide(self.fisher)
        groups = None if self.groups is None else self.groups.cpu()
        return Inputs(wide(self.theta), fisher, wide(self.logits), self.offsets.cpu(), self.mixing, groups)

    def require_grad(self) -> list[Tensor]:
        """Make θ, F and the logits leaves that want a gradient; rows keep their stride."""
        self.theta = self.theta.detach().requires_grad_()
        self.fisher = None if self.fisher is None else self.fisher.detach().requires_grad_()
        self.logits = self.logits.detach().requires_grad_()
        return [tensor for tensor in (self.theta, self.fisher, self.logits) if tensor is not None]


def make_inputs(sample: Sample, device: torch.device | str = "cpu", seed: int = 0) -> Inputs:
    """Draw the inputs of a sample."""
    generator = torch.Generator().manual_seed(seed)
    models, elements = sample.models, sample.elements

    def laid_out(values: Tensor) -> Tensor:
        padded = torch.full((models, elements + sample.padding), torch.nan, dtype=sample.dtype, device=device)
        padded[:, :elements] = values.to(sample.dtype)
        return padded[:, :elements]

    theta = laid_out(torch.randn(models, elements, generator=generator))
    fisher = (
        laid_out(torch.rand(models, elements, generator=generator) ** 4 + 1e-3) if sample.weighted else None
    )
    rows = len(sample.lengths) if sample.groups is None else max(sample.groups) + 1
    logits = torch.randn(rows, models, generator=generator, dtype=torch.float64)
    if sample.mixing == "ratios":
        logits = logits.abs()
    wide = torch.float64 if sample.dtype == torch.float64 else torch.float32
    return Inputs(
        theta,
        fisher,
        logits.to(device, wide),
        torch.tensor([0, *sample.lengths], device=device).cumsum(0),
        sample.mixing,
        None if sample.groups is None else torch.tensor(sample.groups, device=device),
    )


def extreme_inputs(models: int, elements: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Inputs:
    """Fishers from 1e-41 to 1e38, half of them 0; segments of ten thousand elements."""
    generator = torch.Generator().manual_seed(seed)
    shape = (models, elements)
    exponent = torch.rand(shape, generator=generator, dtype=torch.float64) * 79 - 41
    fisher = (10**exponent).to(dtype) * (torch.rand(shape, generator=generator) < 0.5)
    theta = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    offsets = torch.arange(0, elements + 1, 10_000)
    logits = torch.randn(len(offsets) - 1, models, generator=generator, dtype=torch.float64).to(dtype)
    return Inputs(theta, fisher, logits, offsets, "sigmoid", None)


def shares(inputs: Inputs) -> Tensor:
    """w_t / Σ w `[T, P]` in float64: the gradient of the reference with respect to θ."""
    wide = inputs.double()
    theta = wide.theta.requires_grad_()
    arguments, options = wide.arguments()
    merged = reference.fused_merge(theta, *arguments[1:], **options)
    return torch.autograd.grad(merged.sum(), theta)[0]
