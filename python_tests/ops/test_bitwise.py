"""The same bits for every number of threads and every instruction set."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from merge_samples import SAMPLES, Sample, extreme_inputs, make_inputs

import timm_ext
from timm_ext.ops.channels_last_norm import (
    channels_last_norm,
    channels_last_norm_backward,
    channels_last_sums,
)
from timm_ext.ops.norm import batch_norm, group_norm, norm_backward
from timm_ext.ops.trilinear import upsample_trilinear3d, upsample_trilinear3d_backward

DIGEST = "import sys; sys.path[:0] = sys.argv[1:]; from test_bitwise import digest; print(digest())"


def digest(threads: int = 1) -> str:
    """Hash values and gradients of merges, mixings, squares, sampled labels and an instance norm."""
    torch.set_num_threads(1)  # torch's own functions that make the inputs depend on it
    large = Sample("large", models=3, lengths=(33, 70_001, 5, 16_384, 27, 30_000))
    merges = [*(make_inputs(sample) for sample in [*SAMPLES, large]), extreme_inputs(5, 50_000)]
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(50_000, 3, generator=generator)
    gradient = torch.randn(200_000, generator=generator)
    squared = [
        [torch.randn(n, generator=generator).to(dtype) for n in (1, 40_000, 77)]
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    ]
    torch.set_num_threads(threads)
    results: list[torch.Tensor] = []
    for inputs in merges:
        leaves = inputs.require_grad()
        arguments, options = inputs.arguments()
        merged = timm_ext.fused_merge(*arguments, **options)
        results += [merged, *torch.autograd.grad(merged, leaves, gradient[: merged.numel()].to(merged.dtype))]
    for mixing in ("sigmoid", "softmax", "ratios"):
        leaf = logits.abs().requires_grad_() if mixing == "ratios" else logits.clone().requires_grad_()
        rows = torch.ops.timm_ext.log_weights(leaf, mixing)
        results += [rows, *torch.autograd.grad(rows, leaf, gradient[:150_000].view(-1, 3))]
    for grads in squared:
        wide = torch.float64 if grads[0].dtype == torch.float64 else torch.float32
        acc = [torch.ones(g.shape, dtype=wide) for g in grads]
        timm_ext.square_accumulate_(acc, grads, 0.3)
        results += acc
    for dtype in (torch.float32, torch.float64):
        for likelihood in ("bernoulli", "categorical"):
            z = 9 * gradient[: 2 * 3 * 33_331].view(2, 3, -1).to(dtype)
            results += timm_ext.sample_labels(z, torch.tensor([3, -4]), likelihood)
    planes = gradient[:198_000].view(2, 2, 3, -1)
    statistics = torch.linspace(0.1, 2, 12).view(2, 6)
    steep = torch.tensor([0.1, 0.0, 2.0])
    results += norm_backward(*planes, *statistics, *statistics[:, :3], steep, slope_wanted=True)
    results += norm_backward(*planes, *statistics[:, :3], *statistics[:, 3:], over="batch")
    results += group_norm(planes[1], *statistics[:, :3], groups=3)
    results += group_norm(planes[1], groups=1)
    results += batch_norm(planes[1], *statistics[:, :3])
    points = [plane.flatten(2).mT.bfloat16().contiguous() for plane in planes]
    normal, *moments = channels_last_norm(points[1], *statistics[:, :3], groups=3)
    below = channels_last_norm_backward(*points, *moments, *statistics[:, :3], slope=0.1)
    results += [normal, *moments, *below, channels_last_sums(points[0])]
    volumes = gradient[: 6 * 4 * 18 * 22].view(2, 3, 4, 18, 22)
    results += [upsample_trilinear3d(volumes), upsample_trilinear3d_backward(volumes)]
    hasher = hashlib.sha256()
    for tensor in results:
        hasher.update(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return hasher.hexdigest()


def test_the_number_of_threads_does_not_matter() -> None:
    assert digest(threads=1) == digest(threads=2) == digest(threads=5)


def test_the_instruction_set_does_not_matter() -> None:
    digests = {}
    for isa in timm_ext.build_info()["isa_built"]:
        environment = {**os.environ, "TIMM_EXT_ISA": isa, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", DIGEST, *map(str, Path(__file__).parents[:2])]
        run = subprocess.run(command, env=environment, capture_output=True, text=True)
        if "must be one of" not in run.stderr:  # else this CPU does not have it
            assert run.returncode == 0, run.stderr
            digests[isa] = run.stdout.strip()
    assert set(digests.values()) == {digest()}, digests


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_results_written_past_the_caches_have_the_same_bits(dtype: torch.dtype, shift: int) -> None:
    """From 4 MiB on results do not go through the caches, as far as they are aligned; those of parts do."""
    size = 2**22 // dtype.itemsize + 5_000
    first, middle = 70_001, 1_000_003
    generator = torch.Generator().manual_seed(3)
    theta, fisher = torch.randn(2, size, generator=generator).to(dtype), torch.rand(2, size).to(dtype)
    logits = torch.randn(2, 2, generator=generator)
    out = torch.full((size + shift,), torch.nan, dtype=dtype)[shift:]
    timm_ext.fused_merge(theta, fisher, logits, torch.tensor([0, first, size]), out=out)
    parts = [
        timm_ext.fused_merge(theta[:, :middle], fisher[:, :middle], logits, torch.tensor([0, first, middle])),
        timm_ext.fused_merge(
            theta[:, middle:], fisher[:, middle:], logits[1:], torch.tensor([0, size - middle])
        ),
    ]
    assert torch.equal(out, torch.cat(parts))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_storage_rounds_as_torch_does(dtype: torch.dtype) -> None:
    """With one model the merge only reads and writes: every bit pattern of the type must come back."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    theta = every[every.isfinite()].unsqueeze(0)
    offsets = torch.tensor([0, theta.shape[1]])
    assert torch.equal(
        timm_ext.fused_merge(theta, None, torch.zeros(1, 1), offsets).view(torch.int16)[1:],
        theta[0].view(torch.int16)[1:],
    )
    # Means of two neighbours at random need rounding; float32 arithmetic on exact inputs, then one rounding.
    other = theta[:, torch.randperm(theta.shape[1])]
    small = (theta.float().abs() < 1e4) & (other.float().abs() < 1e4)
    pair = torch.cat([theta[small][None], other[small][None]])
    merged = timm_ext.fused_merge(pair, None, torch.zeros(1, 2), torch.tensor([0, pair.shape[1]]))
    expected = (pair.float().sum(0) / 2).to(dtype)
    assert (merged != expected).float().mean() < 0.01  # a sum of two floats may itself round
    torch.testing.assert_close(merged, expected, rtol=torch.finfo(dtype).eps, atol=2.0**-24)
