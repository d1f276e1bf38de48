"""Derivatives of the merge of any order and mode, its batches, and what is refused in place of a zero."""

import itertools
from collections.abc import Callable, Sequence

import pytest
import torch
from merge_samples import BACKWARD_BOUND, SAMPLES, Inputs, Sample, extreme_inputs, make_inputs, shares
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap

import timm_ext
from timm_ext.errors import InputError
from timm_ext.ops import reference

Function = Callable[..., Tensor]

MIXED = [
    Sample(mixing, models=3, lengths=(4, 2, 5), dtype=torch.float64, mixing=mixing, groups=(1, 0, 1))
    for mixing in ("sigmoid", "softmax", "ratios")
]
every_mixing = pytest.mark.parametrize("sample", MIXED, ids=lambda sample: sample.name)


def function_of(merge: Function, inputs: Inputs) -> Function:
    """The merge as a function of θ, F (where there is one) and the logits."""

    def merged(*values: Tensor) -> Tensor:
        theta, fisher, logits = values if len(values) == 3 else (values[0], None, values[1])
        return merge(theta, fisher, logits, inputs.offsets, mixing=inputs.mixing, groups=inputs.groups)

    return merged


def values_of(inputs: Inputs) -> tuple[Tensor, ...]:
    return tuple(value for value in (inputs.theta, inputs.fisher, inputs.logits) if value is not None)


def both(inputs: Inputs) -> tuple[Function, Function]:
    return function_of(timm_ext.fused_merge, inputs), function_of(reference.fused_merge, inputs)


def directions(values: Sequence[Tensor]) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randn(v.shape, generator=generator, dtype=torch.float64).to(v.dtype) for v in values)


def flat(nested: object) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(nested) if isinstance(leaf, Tensor)]


def assert_alike(got: object, expected: object) -> None:
    for actual, wanted in zip(flat(got), flat(expected), strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: sample.name)
def test_tangent_is_that_of_the_reference(sample: Sample) -> None:
    inputs, wide = make_inputs(sample), make_inputs(sample).double()
    along = directions(values_of(inputs))
    _, got = jvp(function_of(timm_ext.fused_merge, inputs), values_of(inputs), along)
    _, expected = jvp(
        function_of(reference.fused_merge, wide), values_of(wide), tuple(a.double() for a in along)
    )
    assert got.dtype == sample.dtype
    scale = float(expected.abs().amax()) if sample.elements else 0.0
    assert got.double() == pytest.approx(expected, rel=0, abs=BACKWARD_BOUND[sample.dtype] * scale)


@every_mixing
@pytest.mark.parametrize("argument", [0, 1, 2], ids=["theta", "fisher", "logits"])
def test_tangent_along_one_argument(sample: Sample, argument: int) -> None:
    ours, theirs = both(make_inputs(sample))
    values = values_of(make_inputs(sample))

    def of_one(merge: Function) -> Function:
        return lambda value: merge(*values[:argument], value, *values[argument + 1 :])

    along = directions(values)[argument : argument + 1]
    point = values[argument : argument + 1]
    got, expected = jvp(of_one(ours), point, along), jvp(of_one(theirs), point, along)
    assert float(expected[1].abs().amax()) > 0.01
    assert_alike(got, expected)
    assert_alike(jacfwd(of_one(ours))(*point), jacfwd(of_one(theirs))(*point))
    assert_alike(jacrev(of_one(ours))(*point), jacrev(of_one(theirs))(*point))


def test_tangent_of_extreme_fishers_keeps_its_precision() -> None:
    inputs = extreme_inputs(3, 50_000)
    wide = inputs.double()
    d_theta, d_logits = directions((inputs.theta, inputs.logits))

    def tangent(merge: Function, of: Inputs, dtype: torch.dtype) -> Tensor:
        def merged(theta: Tensor, logits: Tensor) -> Tensor:
            return merge(theta, of.fisher, logits, of.offsets)

        return jvp(merged, (of.theta, of.logits), (d_theta.to(dtype), d_logits.to(dtype)))[1]

    got = tangent(timm_ext.fused_merge, inputs, torch.float32)
    expected = tangent(reference.fused_merge, wide, torch.float64)
    share = shares(inputs)
    magnitude = (share * (d_theta.double().abs() + 4 * wide.theta.abs().amax(0) * 4)).sum(0)
    assert bool(((got.double() - expected).abs() <= BACKWARD_BOUND[torch.float32] * magnitude).all())


@every_mixing
def test_gradcheck_in_both_modes_and_in_batches(sample: Sample) -> None:
    inputs = make_inputs(sample)
    leaves = inputs.require_grad()
    merge = function_of(timm_ext.fused_merge, inputs)
    assert torch.autograd.gradcheck(
        merge, leaves, check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True
    )
    assert torch.autograd.gradgradcheck(
        merge, leaves, check_fwd_over_rev=True, check_rev_over_rev=True, check_batched_grad=True
    )


def test_gradcheck_without_fisher() -> None:
    inputs = make_inputs(Sample("", models=2, lengths=(3, 4), dtype=torch.float64, weighted=False))
    leaves = inputs.require_grad()
    merge = function_of(timm_ext.fused_merge, inputs)
    assert torch.autograd.gradcheck(merge, leaves, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(merge, leaves, check_fwd_over_rev=True)


def test_gradcheck_where_every_fisher_is_zero() -> None:
    inputs = make_inputs(Sample("", models=3, lengths=(3, 4), dtype=torch.float64))
    inputs.fisher[:, ::2] = 0
    inputs.theta, inputs.logits = inputs.theta.requires_grad_(), inputs.logits.requires_grad_()

    def merge(theta: Tensor, logits: Tensor) -> Tensor:
        return timm_ext.fused_merge(theta, inputs.fisher, logits, inputs.offsets)

    assert torch.autograd.gradcheck(merge, (inputs.theta, inputs.logits), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(merge, (inputs.theta, inputs.logits), check_fwd_over_rev=True)


@every_mixing
def test_hessian_is_that_of_the_reference(sample: Sample) -> None:
    ours, theirs = both(make_inputs(sample))
    values = values_of(make_inputs(sample))
    arguments = (0, 1, 2)
    got = hessian(lambda *v: ours(*v).sin().sum(), arguments)(*values)
    assert_alike(got, hessian(lambda *v: theirs(*v).sin().sum(), arguments)(*values))


@pytest.mark.parametrize("modes", list(itertools.product((jacfwd, jacrev), repeat=3)))
def test_third_derivatives_in_any_order_of_modes(modes: tuple[Callable[..., Function], ...]) -> None:
    inputs = make_inputs(MIXED[0])

    def third(merge: Function) -> Tensor:
        def value(logits: Tensor) -> Tensor:
            return merge(inputs.theta, inputs.fisher, logits).square().sum()

        for mode in modes:
            value = mode(value)
        return value(inputs.logits)

    got, expected = (third(merge) for merge in both(inputs))
    assert float(expected.abs().amax()) > 1e-3
    assert_alike(got, expected)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_linearized_merge() -> None:
    inputs = make_inputs(MIXED[0])
    ours, theirs = both(inputs)
    values, along = values_of(inputs), directions(values_of(inputs))
    _, linear = torch.func.linearize(ours, *values)
    assert_alike(linear(*along), jvp(theirs, values, along)[1])


@pytest.mark.parametrize("vectorize", [False, True])
@pytest.mark.parametrize("strategy", ["reverse-mode", "forward-mode"])
def test_functional_jacobian(vectorize: bool, strategy: str) -> None:
    inputs = make_inputs(MIXED[0])
    if strategy == "forward-mode" and not vectorize:
        pytest.skip("PyTorch has no such way")
    got, expected = (
        torch.autograd.functional.jacobian(merge, values_of(inputs), vectorize=vectorize, strategy=strategy)
        for merge in both(inputs)
    )
    assert_alike(got, expected)


def test_gradient_of_a_tangent_of_dual_numbers() -> None:
    inputs = make_inputs(MIXED[0])

    def gradients(merge: Function) -> tuple[Tensor, ...]:
        leaves = [value.clone().requires_grad_() for value in values_of(inputs)]
        along = directions(leaves)
        with forward_ad.dual_level():
            dual = merge(*(forward_ad.make_dual(x, d) for x, d in zip(leaves, along, strict=True)))
            tangent = forward_ad.unpack_dual(dual).tangent
            return torch.autograd.grad(tangent.sin().sum(), leaves)

    ours, theirs = both(inputs)
    assert_alike(gradients(ours), gradients(theirs))


BATCHED = list(itertools.product((False, True), repeat=5))[1:]


def batches() -> tuple[list[Tensor], list[Tensor], tuple[int, ...]]:
    """θ, F, logits, offsets and groups, batches of four of each, and the axis of each batch."""
    inputs = make_inputs(MIXED[0])
    single = [inputs.theta, inputs.fisher, inputs.logits, inputs.offsets, inputs.groups]
    generator = torch.Generator().manual_seed(2)
    models, elements = inputs.theta.shape
    batch = [
        torch.randn(models, 4, elements, generator=generator, dtype=torch.float64),
        torch.rand(models, elements, 4, generator=generator, dtype=torch.float64) + 0.1,
        torch.randn(4, 2, models, generator=generator, dtype=torch.float64),
        torch.tensor([[0, 4, 6, 11], [0, 1, 2, 11], [0, 3, 4, 11], [0, 9, 10, 11]]).T,
        torch.randint(0, 2, (4, 3), generator=generator),
    ]
    return single, batch, (1, 2, 0, 1, 0)


def chosen(which: Sequence[bool]) -> tuple[list[Tensor], list[int | None], list[list[Tensor]]]:
    single, batch, places = batches()
    mixed = [b if w else s for w, s, b in zip(which, single, batch, strict=True)]
    dims = [place if w else None for w, place in zip(which, places, strict=True)]
    examples = [
        [value if dim is None else value.select(dim, k) for value, dim in zip(mixed, dims, strict=True)]
        for k in range(4)
    ]
    return mixed, dims, examples


def merge_of_all(merge: Function) -> Function:
    return lambda theta, fisher, logits, offsets, groups: merge(theta, fisher, logits, offsets, groups=groups)


@pytest.mark.parametrize("which", BATCHED, ids=str)
def test_a_batch_gives_the_bits_of_single_calls(which: tuple[bool, ...]) -> None:
    mixed, dims, examples = chosen(which)
    ours = merge_of_all(timm_ext.fused_merge)
    got = vmap(ours, in_dims=tuple(dims))(*mixed)
    for one, example in zip(got, examples, strict=True):
        assert torch.equal(one, ours(*(value.contiguous() for value in example)))


@pytest.mark.parametrize("which", [BATCHED[0], BATCHED[9], BATCHED[20], BATCHED[-1]], ids=str)
def test_derivatives_of_a_batch(which: tuple[bool, ...]) -> None:
    mixed, dims, examples = chosen(which)

    def gradient(merge: Function) -> Function:
        return grad(lambda *v: merge_of_all(merge)(*v).sin().sum(), argnums=(0, 1, 2))

    def tangent(merge: Function) -> Function:
        def along(*v: Tensor) -> Tensor:
            ones = tuple(torch.ones_like(value) for value in v[:3])
            return jvp(lambda *first: merge_of_all(merge)(*first, *v[3:]), v[:3], ones)[1]

        return along

    for derivative in (gradient, tangent):
        got = vmap(derivative(timm_ext.fused_merge), in_dims=tuple(dims))(*mixed)
        expected = [derivative(reference.fused_merge)(*example) for example in examples]
        assert_alike(got, [torch.stack(each) for each in zip(*map(flat, expected), strict=True)])


def test_batches_in_batches() -> None:
    inputs = make_inputs(MIXED[0])
    logits = torch.randn(3, 2, *inputs.logits.shape, dtype=torch.float64)
    ours, _ = both(inputs)
    theta, fisher = inputs.theta, inputs.fisher
    got = vmap(vmap(lambda row: ours(theta, fisher, row)), in_dims=1, out_dims=1)(logits)
    for i, j in itertools.product(range(3), range(2)):
        assert torch.equal(got[i, j], ours(theta, fisher, logits[i, j]))


def test_ratios_have_tangents_gradients_and_batches() -> None:
    logits = torch.randn(4, 2, 3, dtype=torch.float64)

    def plain(row: Tensor) -> Tensor:
        return row.sigmoid() / row.sigmoid().sum(1, keepdim=True)

    assert_alike(vmap(timm_ext.ratios)(logits), vmap(plain)(logits))
    assert_alike(jacfwd(timm_ext.ratios)(logits[0]), jacfwd(plain)(logits[0]))
    assert_alike(jacrev(jacrev(timm_ext.ratios))(logits[0]), jacrev(jacrev(plain))(logits[0]))


def test_a_compiled_merge_has_tangents() -> None:
    inputs = make_inputs(MIXED[0])
    ours, theirs = both(inputs)
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    values, along = values_of(inputs), directions(values_of(inputs))
    expected = jvp(theirs, values, along)[1]
    with forward_ad.dual_level():
        dual = compiled(*(forward_ad.make_dual(x, d) for x, d in zip(values, along, strict=True)))
        assert_alike(forward_ad.unpack_dual(dual).tangent, expected)


@pytest.mark.parametrize("transform", [grad, jacfwd])
def test_transforms_in_a_compiled_graph_are_refused_or_right(transform: Callable[..., Function]) -> None:
    """Where PyTorch leaves the call out of its graph, which is its own choice, the call is as without one."""
    inputs = make_inputs(MIXED[0])
    ours, theirs = both(inputs)
    compiled = torch.compile(
        lambda row: transform(lambda r: ours(inputs.theta, inputs.fisher, r).sum())(row), backend="aot_eager"
    )
    got, refusal = None, ""
    try:
        got = compiled(inputs.logits)
    except Exception as error:
        refusal = str(error)
    if got is None:
        assert "expected no transform of torch.func within torch.compile" in refusal
    else:
        assert_alike(got, transform(lambda r: theirs(inputs.theta, inputs.fisher, r).sum())(inputs.logits))


def test_out_takes_no_derivative_and_no_transform() -> None:
    inputs = make_inputs(MIXED[0])
    out = torch.full((11,), 7.0, dtype=torch.float64)

    def merge(theta: Tensor) -> Tensor:
        arguments, options = inputs.arguments()
        return timm_ext.fused_merge(theta, *arguments[1:], **options, out=out)

    for call in (
        lambda: jvp(merge, (inputs.theta,), (inputs.theta,)),
        lambda: vmap(merge)(inputs.theta[None]),
        lambda: grad(lambda theta: merge(theta).sum())(inputs.theta),
    ):
        with pytest.raises(InputError, match=r"out: expected no transform of torch\.func"):
            call()
    with (
        forward_ad.dual_level(),
        pytest.raises(InputError, match="fused_merge with out: expected tensors without a tangent"),
    ):
        merge(forward_ad.make_dual(inputs.theta, inputs.theta))
    assert bool((out == 7).all())


def test_an_empty_batch_is_refused() -> None:
    inputs = make_inputs(MIXED[0])
    ours, _ = both(inputs)
    with pytest.raises(InputError, match="vmap: expected a batch of one example or more"):
        vmap(lambda row: ours(inputs.theta, inputs.fisher, row))(torch.zeros(0, 2, 3, dtype=torch.float64))


def test_groups_are_checked_in_a_batch() -> None:
    inputs = make_inputs(MIXED[0])
    with pytest.raises(InputError, match=r"groups: expected rows of logits, 0 to 1 \(got 0 to 2\)"):
        vmap(lambda g: timm_ext.fused_merge(*values_of(inputs), inputs.offsets, groups=g))(
            torch.tensor([[0, 1, 0], [0, 2, 0]])
        )
