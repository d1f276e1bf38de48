"""A twin of every operator in plain PyTorch: definition, oracle of the tests and baseline of the benchmarks.

The signatures are those of the functions in `timm_ext.ops`, whose docstrings hold for both. Run in float64
these functions are the truth; in float32 they overflow, underflow and cancel where the operators do not.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

Given = Tensor | None
Three = tuple[Tensor, Tensor, Tensor]
SMALLEST_WEIGHT = 2.0**-100  # relative to the largest of a row; what is below counts as 0


def log_weights(logits: Tensor, mixing: str) -> Tensor:
    """Return log-weights `[G, T]` of mixing logits `[G, T]`, less the largest of each row."""
    if mixing == "sigmoid":
        values = functional.logsigmoid(logits)
    elif mixing == "softmax":
        values = logits
    elif mixing == "ratios":
        left_out = torch.where(logits == 0, -torch.inf, torch.nan).to(logits.dtype)
        values = torch.where(logits > 0, torch.where(logits > 0, logits, 1).log(), left_out)
    else:
        raise ValueError(f"mixing: expected 'sigmoid', 'softmax' or 'ratios' (got {mixing!r})")
    return values - values.amax(1, keepdim=True)


def fused_merge(
    theta: Tensor,
    fisher: Tensor | None,
    logits: Tensor,
    offsets: Tensor,
    *,
    mixing: str = "sigmoid",
    groups: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Return Σ_t α F θ / Σ_t α F `[P]`, or the α-weighted mean where every F is 0; see `timm_ext`."""
    rows = log_weights(logits.to(theta.dtype), mixing)
    if groups is not None:
        rows = rows[groups]
    alpha = rows.exp()
    alpha = torch.where(alpha < SMALLEST_WEIGHT, 0, alpha)
    alpha = alpha.repeat_interleave(offsets.diff(), dim=0).T  # [T, P]
    weight = alpha if fisher is None else alpha * fisher
    weight = torch.where(weight.sum(0) > 0, weight, alpha)
    merged = (weight * theta).sum(0) / weight.sum(0)
    return merged if out is None else out.copy_(merged)


def log_weights_backward(grad: Tensor, logits: Tensor, mixing: str) -> Tensor:
    """Return the gradient of the logits `[G, T]` for that of their log-weights `[G, T]`."""
    leaf = logits.detach().requires_grad_()
    with torch.enable_grad():
        return torch.autograd.grad(log_weights(leaf, mixing), leaf, grad)[0]


def fused_merge_backward_log_weight(
    grad: Tensor, theta: Tensor, fisher: Tensor | None, log_weight: Tensor, offsets: Tensor
) -> Tensor:
    """Return the gradient of the log-weights `[S, T]` for that of the merge `[P]`."""
    leaf = log_weight.detach().requires_grad_()
    with torch.enable_grad():
        merged = fused_merge(theta, fisher, leaf, offsets, mixing="softmax")
    return torch.autograd.grad(merged, leaf, grad)[0]


def fused_merge_backward_matrices(
    grad: Tensor,
    theta: Tensor,
    fisher: Tensor | None,
    log_weight: Tensor,
    offsets: Tensor,
    theta_wanted: bool,
    fisher_wanted: bool,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of theta and fisher, `[T, P]` each, or `[0]` where one is not wanted."""
    theta = theta.detach().requires_grad_()
    fisher = None if fisher is None else fisher.detach().requires_grad_()
    with torch.enable_grad():
        merged = fused_merge(theta, fisher, log_weight, offsets, mixing="softmax")

    def gradient(of: Tensor | None, wanted: bool) -> Tensor:
        if of is None or not wanted:
            return merged.new_empty(0)
        return torch.autograd.grad(merged, of, grad, retain_graph=True)[0]

    return gradient(theta, theta_wanted), gradient(fisher, fisher_wanted)


def square_accumulate_(acc: Sequence[Tensor], grads: Sequence[Tensor], scale: float = 1.0) -> None:
    """Add scale · Σ g² to each accumulator in place; see `timm_ext.square_accumulate_`."""
    for first in range(0, len(grads), len(acc)):
        for total, grad in zip(acc, grads[first : first + len(acc)], strict=True):
            wide = grad.to(total.dtype)
            total += wide * scale * wide


def conv_weight_grad_square_(
    acc: Tensor,
    grad: Tensor,
    input: Tensor,
    *,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int = 1,
    scale: float = 1.0,
) -> None:
    """Add squared weight gradients of single examples; see `timm_ext.conv_weight_grad_square_`."""
    axes = acc.ndim - 2
    for one_grad, one_input in zip(grad.split(1), input.split(1), strict=True):
        _, weight_grad, _ = torch.ops.aten.convolution_backward(
            one_grad,
            one_input,
            acc,
            None,
            stride,
            padding,
            dilation,
            False,
            [0] * axes,
            groups,
            (False, True, False),
        )
        acc += scale * weight_grad.square()


def conv3d_weight_gradient(
    grad: Tensor,
    input: Tensor,
    kernel: Sequence[int],
    *,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int = 1,
) -> Tensor:
    """Return the gradient of a convolution's weight `[O, I / groups, *kernel]`."""
    weight = input.new_empty(grad.shape[1], input.shape[1] // groups, *kernel)
    around = stride, padding, dilation, False, [0] * 3, groups
    mask = False, True, False
    result: Tensor = torch.ops.aten.convolution_backward(grad, input, weight, None, *around, mask)[1]
    return result


def depthwise_conv3d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """Convolve each channel of `[B, C, D, H, W]` by its own kernel, `[C, 1, ...]`."""
    around = tuple(stride), tuple(padding), tuple(dilation)
    return functional.conv3d(input, weight, bias, *around, groups=input.shape[1])


def depthwise_conv_transpose3d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    size: Sequence[int],
) -> Tensor:
    """Make the gradient of the input, of that size, of `depthwise_conv3d` of that of its output."""
    large = input.new_empty(*input.shape[:2], *size)
    around = tuple(stride), tuple(padding), tuple(dilation), False, (0,) * 3, input.shape[1]
    mask = True, False, False
    result: Tensor = torch.ops.aten.convolution_backward(input, large, weight, None, *around, mask)[0]
    return result if bias is None else result + bias.view(-1, 1, 1, 1)


def small_conv3d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    mirrored: bool = False,
) -> Tensor:
    """Convolve `[B, I, D, H, W]`; a mirrored weight is `[I, O, ...]`, its taps taken backwards."""
    weight = weight.transpose(0, 1).flip(2, 3, 4) if mirrored else weight
    return functional.conv3d(input, weight, bias, tuple(stride), tuple(padding), tuple(dilation))


def winograd_conv3d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    padding: Sequence[int],
    mirrored: bool = False,
) -> Tensor:
    """Convolve `[B, I, D, H, W]` with stride 1."""
    once = (1, 1, 1)
    return small_conv3d(input, weight, bias, stride=once, padding=padding, dilation=once, mirrored=mirrored)


def strided_conv3d_input_gradient(grad: Tensor, weight: Tensor, size: Sequence[int]) -> Tensor:
    """Return the gradient of the input, of that size, of a convolution of stride 2, one zero around."""
    more = tuple(1 - whole % 2 for whole in size)
    return functional.conv_transpose3d(grad, weight, stride=2, padding=1, output_padding=more)


def upsample_trilinear3d(input: Tensor) -> Tensor:
    """Enlarge every axis of a volume by two, linearly."""
    return functional.interpolate(input, scale_factor=2, mode="trilinear", align_corners=False)


def upsample_trilinear3d_backward(grad: Tensor) -> Tensor:
    """Return the gradient of what `upsample_trilinear3d` took."""
    sizes = [*grad.shape[:2], *(size // 2 for size in grad.shape[2:])]
    result: Tensor = torch.ops.aten.upsample_trilinear3d_backward(grad, grad.shape[2:], sizes, False)
    return result


def upsample_nearest3d(input: Tensor) -> Tensor:
    """Enlarge every voxel of `[B, C, D, H, W]` to 2 x 2 x 2."""
    return input.repeat_interleave(2, 2).repeat_interleave(2, 3).repeat_interleave(2, 4)


def neighbour_sums3d(input: Tensor) -> Tensor:
    """Return the sums of 2 x 2 x 2 neighbours with zeros around, one more on each axis."""
    padded = functional.pad(input, (1,) * 6)
    return padded.unfold(2, 2, 1).unfold(3, 2, 1).unfold(4, 2, 1).sum((5, 6, 7))


def upsampled_conv3d(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Convolve what `upsample_nearest3d` makes of the input, one zero around."""
    return functional.conv3d(upsample_nearest3d(input), weight, bias, padding=1)


def upsampled_conv3d_input_gradient(sums: Tensor, weight: Tensor) -> Tensor:
    """Return the gradient of the input: Σ_k w[k] h[2 j + 2 − k] on every axis."""
    return functional.conv3d(sums, weight.transpose(0, 1).flip(2, 3, 4), stride=2)


def upsampled_conv3d_weight_grad_square_(
    acc: Tensor, sums: Tensor, input: Tensor, scale: float = 1.0
) -> Tensor:
    """Add scale Σ_b G_b², where G_b[k] = Σ_j x[j] h[2 j + 2 − k] on every axis."""
    for h, x in zip(sums, input, strict=True):
        mirrored = functional.conv3d(h.unsqueeze(1), x.unsqueeze(1), dilation=2)
        acc += scale * mirrored.flip(2, 3, 4).square()
    return acc


def uniform(keys: Tensor, count: int) -> Tensor:
    """Return the random numbers of `timm_ext.sample_labels` for keys `[B]`, float32 `[B, count]` in [0, 1).

    Philox 4x32-10. Of the generator's blocks of four numbers, 16 neighbouring ones give 64 numbers: first the
    first one of each block, then the second, …
    """
    low32 = 0xFFFFFFFF
    blocks = torch.arange(-(-count // 64) * 16, device=keys.device)
    first, second = (blocks & low32).expand(len(keys), -1), (blocks >> 32).expand(len(keys), -1)
    third = fourth = torch.zeros_like(first)
    key0, key1 = (keys & low32)[:, None], (keys >> 32 & low32)[:, None]
    for _ in range(10):
        product0, product1 = first * 0xD2511F53, third * 0xCD9E8D57  # modulo 2^64, whatever the sign
        first, third = (product1 >> 32 & low32) ^ second ^ key0, (product0 >> 32 & low32) ^ fourth ^ key1
        second, fourth = product1 & low32, product0 & low32
        key0, key1 = (key0 + 0x9E3779B9) & low32, (key1 + 0xBB67AE85) & low32
    numbers = torch.stack([first, second, third, fourth], 1).view(len(keys), 4, -1, 16).movedim(2, 1)
    return (numbers.reshape(len(keys), -1)[:, :count] >> 8).float() * 2.0**-24


def sample_labels(
    logits: Tensor, keys: Tensor, likelihood: str, *, labels: bool = True
) -> tuple[Tensor, Tensor]:
    """Return labels, `[0]` where they are not wanted, and the gradient of their log-likelihood."""
    draws = logits[:, 0] if likelihood == "categorical" else logits
    numbers = uniform(keys, draws[0].numel()).view(draws.shape)
    if likelihood == "bernoulli":
        share = logits.sigmoid()
        drawn = (numbers < share).long()
        score = drawn - share
    else:
        share = logits.softmax(1)
        drawn = (share.cumsum(1)[:, :-1] <= numbers.unsqueeze(1)).sum(1)
        score = (-share).scatter_add(1, drawn.unsqueeze(1), torch.ones_like(share[:, :1]))
    return drawn if labels else drawn.new_empty(0), score


def new_tensor(like: Tensor, sizes: Sequence[int]) -> Tensor:
    """Return an uninitialised tensor of another's type and device."""
    return like.new_empty(tuple(sizes))


def group_norm(
    input: Tensor, weight: Given = None, bias: Given = None, *, groups: int, epsilon: float = 1e-5
) -> Three:
    """Return γ (x − μ) / sqrt(σ² + ε) + β `[B, C, ...]`, and μ and σ², `[B · G]` each."""
    normal, mean, variance = _normal(input.reshape(len(input), groups, -1), (2,), epsilon)
    return _affine(normal.view(input.flatten(2).shape), weight, bias).view_as(input), mean, variance


def batch_norm(input: Tensor, weight: Given = None, bias: Given = None, *, epsilon: float = 1e-5) -> Three:
    """Return γ (x − μ) / sqrt(σ² + ε) + β `[B, C, ...]`, and μ and σ², `[C]` each."""
    normal, mean, variance = _normal(input.flatten(2), (0, 2), epsilon)
    return _affine(normal, weight, bias).view_as(input), mean, variance


def _normal(points: Tensor, over: tuple[int, ...], epsilon: float) -> Three:
    """Return (x − μ) / sqrt(σ² + ε), μ and σ²."""
    mean, variance = points.mean(over, keepdim=True), points.var(over, unbiased=False, keepdim=True)
    return (points - mean) * (variance + epsilon).rsqrt(), mean.flatten(), variance.flatten()


def _affine(normal: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """Scale and shift the channels of `[B, C, N]`."""
    scaled = normal if weight is None else normal * weight.view(-1, 1)
    return scaled if bias is None else scaled + bias.view(-1, 1)


def norm_backward(
    grad: Tensor,
    input: Tensor,
    mean: Tensor | None = None,
    variance: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    slope: Tensor | None = None,
    *,
    epsilon: float = 1e-5,
    over: str = "groups",
    slope_wanted: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x, γ, β and the slope, of a norm with its LeakyReLU, example by example."""
    x, grad = input.flatten(2), grad.flatten(2)

    def rows(statistic: Given, default: float) -> Tensor:
        if statistic is None:
            return x.new_full((*x.shape[:2], 1), default)
        if over != "groups":
            return statistic.view(-1, 1).expand(len(x), -1, 1)
        members = len(x) * x.shape[1] // max(len(statistic), 1)
        return statistic.view(len(x), -1, 1).repeat_interleave(members, 1)

    rstd = rows(None if variance is None else (variance + epsilon).rsqrt(), 1.0)
    normal = (x - rows(mean, 0.0)) * rstd
    before = _affine(normal, weight, bias)
    steep = torch.ones_like(grad) if slope is None else slope.view(-1, 1).expand_as(grad)
    above = torch.where(before > 0, 1, steep) * grad
    below = (grad * before.clamp(max=0)).sum(2) if slope_wanted else x.new_empty(0)
    down = _affine(above, weight, None)
    if over != "nothing":
        down = down - _mean_over(down, mean, over) - normal * _mean_over(down * normal, mean, over)
    return (down * rstd).view_as(input), (above * normal).sum(2), above.sum(2), below


def _mean_over(values: Tensor, mean: Tensor | None, over: str) -> Tensor:
    """Replace `[B, C, N]` by its means over what shares a mean."""
    if over == "batch":
        return values.mean((0, 2), keepdim=True)
    assert mean is not None
    sets = values.reshape(mean.numel(), -1)
    return sets.mean(1, keepdim=True).expand_as(sets).reshape(values.shape)


def channels_last_norm(
    input: Tensor, weight: Given = None, bias: Given = None, *, groups: int, epsilon: float = 1e-5
) -> Three:
    """Return γ (x − μ) / sqrt(σ² + ε) + β `[B, points, C]`, and μ and σ², `[B · G]` each."""
    output, mean, variance = group_norm(input.mT.float(), weight, bias, groups=groups, epsilon=epsilon)
    return output.mT.to(input.dtype).contiguous(), mean, variance


def channels_last_norm_backward(
    grad: Tensor,
    input: Tensor,
    mean: Tensor,
    variance: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    slope: float = 1.0,
    epsilon: float = 1e-5,
) -> Three:
    """Return the gradients of x, γ and β, of a norm with its LeakyReLU, example by example."""
    given = grad.mT.float(), input.mT.float(), mean, variance, weight, bias, mean.new_full((1,), slope)
    below, for_weight, for_bias, _ = norm_backward(*given, epsilon=epsilon)
    return below.mT.to(input.dtype).contiguous(), for_weight, for_bias


def channels_last_sums(input: Tensor) -> Tensor:
    """Return Σ over the points `[B, C]`."""
    return input.double().sum(1).float()
