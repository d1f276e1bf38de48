"""Every operator of the library has a twin in plain PyTorch, a fake kernel, and derivatives or none."""

import inspect
from typing import Any

import pytest
import torch
from operator_samples import SAMPLES, Arguments, Sample
from torch import Tensor
from torch.autograd import forward_ad
from torch.library import opcheck
from torch.utils._pytree import tree_leaves, tree_map

from timm_ext.errors import InputError
from timm_ext.ops import conv3d, fisher, memory, merge, norm, reference, upsampled_conv3d

CALLS = [(name, number) for name, sample in SAMPLES.items() for number in range(len(sample.calls))]
every_operator = pytest.mark.parametrize("name", SAMPLES)
every_call = pytest.mark.parametrize(("name", "number"), CALLS)


def schemas() -> dict[str, torch.FunctionSchema]:
    """Those of the library that take or return tensors, by name; the others switch the pool of memory."""
    found = {}
    for schema in torch._C._jit_get_all_schemas():
        if schema.name.startswith("timm_ext::") and "Tensor" in str(schema):
            name = schema.name.removeprefix("timm_ext::")
            found[f"{name}.{schema.overload_name}" if schema.overload_name else name] = schema
    return found


def overload(name: str) -> Any:
    op, _, suffix = name.partition(".")
    return getattr(getattr(torch.ops.timm_ext, op), suffix or "default")


def divided(name: str, arguments: Arguments) -> tuple[Arguments, dict[str, Any]]:
    """The arguments as the operator takes them, by place and by name."""
    expected = overload(name)._schema.arguments
    pairs = list(zip(expected, arguments, strict=True))
    by_name = {argument.name: value for argument, value in pairs if argument.kwarg_only}
    return tuple(value for argument, value in pairs if not argument.kwarg_only), by_name


def arguments_on(device: torch.device | str, name: str, number: int) -> Arguments:
    """A call's arguments on a device that the operator has a kernel for; without one the test is skipped."""
    key = {"cpu": "CPU", "cuda": "CUDA", "meta": "Meta"}[torch.device(device).type]
    if not torch._C._dispatch_has_kernel_for_dispatch_key(f"timm_ext::{name}", key):
        pytest.skip(f"{name} is for the CPU")
    drawn = SAMPLES[name].calls[number]()
    return tuple(tree_map(lambda v: v.to(device) if isinstance(v, Tensor) else v, value) for value in drawn)


def run(name: str, arguments: Arguments) -> Any:
    by_place, by_name = divided(name, arguments)
    return overload(name)(*by_place, **by_name)


def results(sample: Sample, returned: Any, arguments: Arguments) -> list[Tensor]:
    """What a call has made: its results, or what it has changed."""
    changed = [arguments[place] for place in sample.changed]
    return [value for value in tree_leaves(changed or returned) if isinstance(value, Tensor)]


def wide(value: Any) -> Any:
    return value.detach().double() if isinstance(value, Tensor) and value.is_floating_point() else value


def test_every_operator_of_tensors_is_here() -> None:
    assert set(schemas()) == set(SAMPLES)


@every_operator
def test_each_has_a_fake_kernel(name: str) -> None:
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"timm_ext::{name}", "Meta")


@pytest.mark.parametrize("module", [conv3d, fisher, memory, merge, norm, upsampled_conv3d])
def test_twins_have_the_signatures_of_the_functions(module: Any) -> None:
    """As far as both are public: names of parameters, their kinds, and what they are by default."""
    functions = {
        name: function
        for name, function in vars(module).items()
        if inspect.isfunction(function)
        and function.__module__ == module.__name__
        and hasattr(reference, name)
    }
    assert functions
    for name, function in functions.items():
        pair = [inspect.signature(f).parameters.values() for f in (function, getattr(reference, name))]
        ours, twins = ([(p.name, p.kind, p.default) for p in parameters] for parameters in pair)
        assert ours == twins, name


@every_call
def test_each_gives_what_its_twin_gives(name: str, number: int, device: torch.device) -> None:
    sample, arguments = SAMPLES[name], arguments_on(device, name, number)
    twins = tuple(tree_map(wide, value) for value in arguments)
    expected = results(sample, sample.twin(**sample.named(twins)), twins)
    got = results(sample, run(name, arguments), arguments)
    assert len(got) == len(expected) > 0
    for one, other in zip(got, expected, strict=True):
        assert one.shape == other.shape
        digits = 2.0**-8 if one.dtype == torch.bfloat16 else 2e-6
        rough = digits * float(other.abs().nan_to_num(posinf=0).max()) if other.numel() else 0.0
        torch.testing.assert_close(one.to(other.dtype), other, rtol=digits, atol=rough)


@pytest.mark.parametrize(("name", "number"), [call for call in CALLS if SAMPLES[call[0]].function])
def test_its_function_gives_the_same_bits(name: str, number: int) -> None:
    sample = SAMPLES[name]
    torch.manual_seed(1)
    arguments = sample.calls[number]()
    torch.manual_seed(1)
    others = sample.calls[number]()
    got = results(sample, sample.function(**sample.named(arguments)), arguments)
    expected = results(sample, run(name, others), others)
    assert all(torch.equal(one, other) for one, other in zip(got, expected, strict=True))


@pytest.mark.parametrize("name", [name for name, sample in SAMPLES.items() if sample.function])
@pytest.mark.parametrize("dynamic", [False, True])
def test_its_function_compiles_to_one_graph(name: str, dynamic: bool, device: torch.device) -> None:
    sample = SAMPLES[name]
    arguments = sample.named(arguments_on(device, name, 0))
    others = tree_map(lambda v: v.clone() if isinstance(v, Tensor) else v, arguments)

    def step(given: dict[str, Any]) -> Any:
        returned = sample.function(**given)
        return [value * 2 for value in results(sample, returned, tuple(given.values()))]

    torch.compiler.reset()  # graphs of one function are counted
    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    assert all(torch.equal(a, b) for a, b in zip(compiled(arguments), step(others), strict=True))


@every_call
def test_opcheck(name: str, number: int, device: torch.device) -> None:
    arguments = arguments_on(device, name, number)
    opcheck(overload(name), *divided(name, arguments))
    if SAMPLES[name].differentiable:
        opcheck(overload(name), *divided(name, with_leaves(arguments)))


def with_leaves(arguments: Arguments) -> Arguments:
    """The arguments, floating-point ones in float64 and with a gradient."""
    return tuple(v.requires_grad_() if is_floating(v) else v for v in map(wide, arguments))


def is_floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


@every_call
def test_on_meta_it_has_results_of_the_same_shapes(name: str, number: int) -> None:
    sample = SAMPLES[name]
    arguments, bare = arguments_on("cpu", name, number), arguments_on("meta", name, number)
    expected = results(sample, run(name, arguments), arguments)
    got = results(sample, run(name, bare), bare)
    assert [(one.shape, one.dtype) for one in got] == [(one.shape, one.dtype) for one in expected]
    assert all(one.is_meta for one in got)


@pytest.mark.parametrize("name", [name for name, sample in SAMPLES.items() if sample.differentiable])
@pytest.mark.parametrize("number", [0, 1])
def test_gradcheck(name: str, number: int) -> None:
    arguments = with_leaves(SAMPLES[name].calls[number]())
    places = [place for place, value in enumerate(arguments) if is_floating(value)]

    def function(*values: Tensor) -> Any:
        given = dict(zip(places, values, strict=True))
        made = run(name, tuple(given.get(place, value) for place, value in enumerate(arguments)))
        return tuple(value for value in tree_leaves(made) if value.numel())

    assert torch.autograd.gradcheck(function, [arguments[place] for place in places], atol=1e-7)


WITHOUT_DERIVATIVE = {name for name, sample in SAMPLES.items() if not sample.differentiable} - {"new_tensor"}


@pytest.mark.parametrize("name", sorted(WITHOUT_DERIVATIVE))
def test_one_without_a_derivative_refuses_a_tangent(name: str) -> None:
    sample = SAMPLES[name]
    place = len(sample.calls[0]()) - 1 if name == "fused_merge.out" else 0
    with forward_ad.dual_level():
        arguments = list(sample.calls[0]())
        arguments[place] = tree_map(lambda v: forward_ad.make_dual(v, v), arguments[place])
        message = f"^{name.replace('.', '[.]')}: expected tensors without a tangent"
        with pytest.raises(InputError, match=message):
            run(name, tuple(arguments))
        if sample.function is not None:
            with pytest.raises(InputError, match=message):
                sample.function(**sample.named(tuple(arguments)))
