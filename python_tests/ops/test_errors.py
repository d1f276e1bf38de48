"""Each message of the merge, and that nothing is computed after it."""

from collections.abc import Callable

import pytest
import torch

import timm_ext
from timm_ext.errors import InputError
from timm_ext.ops import conv3d as layer_ops
from timm_ext.ops import depthwise_conv3d as depthwise_ops
from timm_ext.ops import norm as norm_ops
from timm_ext.ops import upsampled_conv3d as upsampled_ops

Arguments = dict[str, object]


def good() -> Arguments:
    return {
        "theta": torch.randn(2, 10),
        "fisher": torch.rand(2, 10),
        "logits": torch.zeros(3, 2),
        "offsets": torch.tensor([0, 2, 5, 10]),
    }


def call(arguments: Arguments) -> torch.Tensor:
    arguments = dict(arguments)
    positional = [arguments.pop(name) for name in ("theta", "fisher", "logits", "offsets")]
    return timm_ext.fused_merge(*positional, **arguments)


def test_the_good_arguments_are_good() -> None:
    assert call(good()).shape == (10,)


WRAPPER: list[tuple[Callable[[Arguments], object], str]] = [
    (
        lambda a: a.update(mixing="mean"),
        r"mixing: expected one of 'sigmoid', 'softmax', 'ratios' \(got 'mean'\)",
    ),
    (lambda a: a.update(theta=torch.randn(10)), r"logits: expected \[G, T\] for theta \[T, P\].*for \[10\]"),
    (lambda a: a.update(theta=torch.randn(2, 10, 1)), r"logits: expected .* for \[2, 10, 1\]"),
    (lambda a: a.update(logits=torch.zeros(3)), r"logits: expected \[G, T\] for theta \[T, P\] \(got \[3\]"),
    (lambda a: a.update(logits=torch.zeros(3, 4)), r"got \[3, 4\] for \[2, 10\]"),
    (lambda a: a.update(logits=torch.zeros(2, 2)), r"one row for each of the 3 segments.*got 2 rows"),
    (lambda a: a.update(groups=torch.zeros(2, dtype=torch.int64)), r"groups: expected int64 \[S\] = \[3\]"),
    (lambda a: a.update(groups=torch.zeros(3)), r"groups: expected int64 \[S\] = \[3\] \(got torch.float32"),
    (
        lambda a: a.update(groups=torch.tensor([0, 1, 3])),
        r"groups: expected rows of logits, 0 to 2 \(got 0 to 3\)",
    ),
    (lambda a: a.update(groups=torch.tensor([0, -1, 2])), r"got -1 to 2"),
    (
        lambda a: a.update(out=torch.empty(10), logits=torch.zeros(3, 2, requires_grad=True)),
        "out: expected no tensor that requires a gradient",
    ),
    (
        lambda a: a.update(out=torch.empty(10, requires_grad=True)),
        "out: expected no tensor that requires a gradient",
    ),
    (lambda a: a.update(logits=torch.zeros(3, 2).cfloat()), r"logits: expected floating-point.*complex64"),
    (
        lambda a: a.update(offsets=torch.zeros(0, dtype=torch.int64)),
        r"offsets: expected \[S \+ 1\] \(got \[0\]\)",
    ),
    (lambda a: a.update(offsets=torch.tensor(3)), r"offsets: expected \[S \+ 1\] \(got \[\]\)"),
    (
        lambda a: a.update(offsets=torch.tensor([0, 2, 5, 10]).int()),
        r"offsets: expected torch\.int64 \(got torch\.int32\)",
    ),
]

OPERATOR: list[tuple[Callable[[Arguments], object], str]] = [
    (
        lambda a: a.update(theta=torch.zeros(0, 10), fisher=None, logits=torch.zeros(3, 0)),
        r"logits must be \[G, T\] with T >= 1 \(got \[3, 0\]\)",
    ),
    (
        lambda a: a.update(theta=torch.zeros(2, 10, dtype=torch.int32)),
        "theta must be float32, bfloat16, float16 or",
    ),
    (
        lambda a: a.update(theta=torch.randn(10, 2).T),
        r"theta must have stride 1 along P.*got strides \[1, 2\]",
    ),
    (
        lambda a: a.update(theta=torch.randn(10).expand(2, 10)),
        r"rows at least P apart \(got strides \[0, 1\]",
    ),
    (
        lambda a: a.update(fisher=torch.rand(2, 9)),
        r"fisher must have the shape of theta \(got \[2, 9\] vs \[2, 10\]\)",
    ),
    (
        lambda a: a.update(fisher=torch.rand(2, 1)),
        r"fisher must have the shape of theta \(got \[2, 1\] vs \[2, 10\]\)",
    ),
    (
        lambda a: a.update(fisher=torch.rand(10)),
        r"fisher must have the shape of theta \(got \[10\] vs \[2, 10\]\)",
    ),
    (
        lambda a: a.update(fisher=torch.rand(2, 10).double()),
        r"fisher must be float32 like theta \(got float64\)",
    ),
    (lambda a: a.update(fisher=torch.rand(10, 2).T), "fisher must have stride 1 along P"),
    (
        lambda a: a.update(offsets=torch.tensor([0, -1, 2, -1, 5, -1, 10])[::2]),
        r"offsets must be \[S \+ 1\], contiguous \(got \[4\]\)",
    ),
    (
        lambda a: a.update(offsets=torch.tensor([0, 2, 5, 9])),
        r"offsets must go from 0 to P = 10 \(got 0 to 9\)",
    ),
    (
        lambda a: a.update(offsets=torch.tensor([1, 2, 5, 10])),
        r"offsets must go from 0 to P = 10 \(got 1 to 10\)",
    ),
    (
        lambda a: a.update(offsets=torch.tensor([0, 5, 5, 10])),
        r"strictly increasing \(got 5 then 5 at segment 1\)",
    ),
    (
        lambda a: a.update(offsets=torch.tensor([0, -2, 5, 10])),
        r"strictly increasing \(got 0 then -2 at segment 0\)",
    ),
    (
        lambda a: a.update(offsets=torch.tensor([0, 12, 5, 10])),
        r"strictly increasing \(got 12 then 5 at segment 1\)",
    ),
    (
        lambda a: a.update(offsets=torch.tensor([0]), logits=torch.zeros(0, 2)),
        r"one segment or more just when P > 0 \(got 0 segments for P = 10\)",
    ),
    (
        lambda a: a.update(
            theta=torch.zeros(2, 0), fisher=None, logits=torch.zeros(1, 2), offsets=torch.tensor([0, 0])
        ),
        r"one segment or more just when P > 0 \(got 1 segments for P = 0\)",
    ),
    (lambda a: a.update(out=torch.empty(9)), r"out must be \[P\] = \[10\], contiguous \(got \[9\]"),
    (lambda a: a.update(out=torch.empty(1, 10)), r"out must be.*got \[1, 10\]"),
    (lambda a: a.update(out=torch.empty(20)[::2]), r"out must be.*with strides \[2\]"),
    (lambda a: a.update(out=torch.empty(1).expand(10)), r"out must be.*with strides \[0\]"),
    (lambda a: a.update(out=torch.empty(10).double()), r"out must be float32 like theta \(got float64\)"),
    (
        lambda a: a.update(out=torch.empty(10, dtype=torch.bfloat16)),
        r"out must be float32 like theta \(got bfloat16\)",
    ),
    (lambda a: a.update(out=a["theta"][1]), "out must not share memory with the inputs"),
    (lambda a: a.update(out=a["fisher"][0]), "out must not share memory with the inputs"),
]


@pytest.mark.parametrize(("spoil", "message"), WRAPPER)
def test_wrapper_refuses(spoil: Callable[[Arguments], object], message: str) -> None:
    arguments = good()
    spoil(arguments)
    with pytest.raises(InputError, match=message):
        call(arguments)


@pytest.mark.parametrize(("spoil", "message"), OPERATOR)
def test_operator_refuses(spoil: Callable[[Arguments], object], message: str) -> None:
    arguments = good()
    spoil(arguments)
    with pytest.raises((RuntimeError, InputError), match=message):
        call(arguments)


@pytest.mark.parametrize("matrix", ["theta", "fisher"])
@pytest.mark.parametrize("first", [5, 20, 34], ids=["head", "both rows", "tail"])
def test_out_that_overlaps_a_matrix_in_part_is_refused(matrix: str, first: int) -> None:
    arguments = good()
    storage = torch.rand(50)
    arguments[matrix] = storage.as_strided((2, 10), (15, 1), 10)  # elements 10 to 20 and 25 to 35
    before = storage.clone()
    with pytest.raises(RuntimeError, match="out must not share memory with the inputs"):
        call({**arguments, "out": storage[first : first + 10]})
    assert torch.equal(storage, before)


@pytest.mark.parametrize("first", [0, 35], ids=["before", "behind"])
def test_out_beside_a_matrix_in_one_storage_is_filled(first: int) -> None:
    arguments = good()
    storage = torch.rand(50)
    arguments["theta"] = storage.as_strided((2, 10), (15, 1), 10)
    expected = call(arguments)
    assert torch.equal(call({**arguments, "out": storage[first : first + 10]}), expected)


def operator(name: str, **changes: object) -> object:
    arguments = good()
    arguments["log_weight"] = arguments.pop("logits")
    arguments.update(changes)
    return getattr(torch.ops.timm_ext, name)(**arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"log_weight": torch.zeros(3, 2).double()}, "log_weight must be float32 for matrices of this dtype"),
        ({"log_weight": torch.zeros(2, 2)}, r"log_weight must be \[S, T\] = \[3, 2\] \(got \[2, 2\]\)"),
        ({"log_weight": torch.zeros(2, 3).T}, r"log_weight must be contiguous \(got strides \[1, 3\]\)"),
        ({"theta": torch.zeros(10)}, r"theta must be \[T, P\] with T >= 1 \(got \[10\]\)"),
        ({"theta": torch.zeros(0, 10)}, r"theta must be \[T, P\] with T >= 1 \(got \[0, 10\]\)"),
        ({"offsets": torch.tensor([[0, 10]])}, r"offsets must be \[S \+ 1\], contiguous \(got \[1, 2\]\)"),
    ],
)
def test_bare_operator_refuses(changes: Arguments, message: str) -> None:
    with pytest.raises(RuntimeError, match=f"fused_merge: {message}"):
        operator("fused_merge", **changes)


@pytest.mark.parametrize(
    ("grad", "message"),
    [
        (torch.zeros(9), r"grad must be \[P\] = \[10\] \(got \[9\]\)"),
        (torch.zeros(10).double(), r"grad must be float32 like theta \(got float64\)"),
    ],
)
def test_backward_refuses(grad: torch.Tensor, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        operator("fused_merge_backward_log_weight", grad=grad)


def test_fisher_gradient_without_fisher() -> None:
    with pytest.raises(RuntimeError, match="fisher must be given where its gradient is wanted"):
        operator(
            "fused_merge_backward_matrices",
            grad=torch.zeros(10),
            fisher=None,
            theta_wanted=True,
            fisher_wanted=True,
        )


@pytest.mark.parametrize(
    ("logits", "mixing", "message"),
    [
        (torch.zeros(2, 2), "mean", "mixing must be 'sigmoid', 'softmax' or 'ratios'"),
        (torch.zeros(2), "sigmoid", r"logits must be \[G, T\] with T >= 1 \(got \[2\]\)"),
        (torch.zeros(2, 2).half(), "sigmoid", r"logits must be float32 or float64 \(got float16\)"),
    ],
)
def test_log_weights_refuses(logits: torch.Tensor, mixing: str, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        torch.ops.timm_ext.log_weights(logits, mixing)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.timm_ext.log_weights_backward(torch.zeros_like(logits), logits, mixing)


@pytest.mark.parametrize(
    ("grad", "message"),
    [
        (torch.zeros(2, 2).double(), r"grad must be float32 like logits \(got float64\)"),
        (torch.zeros(2, 3), r"grad must have the shape of logits \(got \[2, 3\] vs \[2, 2\]\)"),
    ],
)
def test_log_weights_backward_refuses(grad: torch.Tensor, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        torch.ops.timm_ext.log_weights_backward(grad, torch.zeros(2, 2), "sigmoid")


def test_ratios_refuses() -> None:
    with pytest.raises(InputError, match="mixing: expected one of"):
        timm_ext.ratios(torch.zeros(1, 2), "mean")  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"logits: expected \[G, T\] \(got \[2\]\)"):
        timm_ext.ratios(torch.zeros(2))


@pytest.mark.parametrize("name", ["fisher", "logits", "offsets", "groups", "out"])
def test_a_tensor_of_another_device_is_named(name: str) -> None:
    arguments = {**good(), "groups": torch.tensor([0, 1, 2]), "out": torch.empty(10)}
    arguments[name] = arguments[name].to("meta")  # type: ignore[attr-defined]
    with pytest.raises(InputError, match=f"{name}: expected a tensor on the device of theta, cpu .got meta"):
        call(arguments)


def test_out_over_the_memory_of_the_offsets_is_refused() -> None:
    memory = torch.zeros(12, dtype=torch.int64)
    memory[:4] = torch.tensor([0, 2, 5, 10])
    with pytest.raises(RuntimeError, match="out must not share memory with the inputs"):
        call({**good(), "offsets": memory[:4], "out": memory.view(torch.float32)[:10]})


@pytest.mark.parametrize("name", ["theta", "fisher", "logits", "offsets", "groups", "out"])
def test_what_is_no_tensor_is_named_by_its_type(name: str) -> None:
    arguments = {**good(), "groups": torch.tensor([0, 1, 2]), "out": torch.empty(10)}
    with pytest.raises(InputError, match=rf"^{name}: expected a torch\.Tensor \(got numpy\.ndarray\)$"):
        call({**arguments, name: arguments[name].numpy()})  # type: ignore[attr-defined]
    with pytest.raises(InputError, match=rf"^{name}: expected a torch\.Tensor \(got list\)$"):
        call({**arguments, name: arguments[name].tolist()})  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["theta", "logits", "offsets"])
def test_what_is_left_out_is_named(name: str) -> None:
    with pytest.raises(InputError, match=rf"^{name}: expected a torch\.Tensor \(got NoneType\)$"):
        call({**good(), name: None})


def test_other_operators_name_the_type_of_what_is_no_tensor() -> None:
    array = torch.ones(1, 1, 2, 2, 2).numpy()
    volume = torch.ones(1, 1, 2, 2, 2)
    geometry = {"stride": [1] * 3, "padding": [0] * 3, "dilation": [1] * 3}
    calls: list[tuple[str, Callable[[], object]]] = [
        (r"acc\[1\]", lambda: timm_ext.square_accumulate_([volume, array], [volume, volume])),
        (r"grads\[0\]", lambda: timm_ext.square_accumulate_([volume], [array])),
        ("grad", lambda: timm_ext.conv_weight_grad_square_(volume, array, volume, **geometry)),
        ("keys", lambda: timm_ext.sample_labels(volume, [1], "bernoulli")),
        ("logits", lambda: timm_ext.ratios(array)),
        ("weight", lambda: layer_ops.small_conv3d(volume, array, **geometry)),
        ("input", lambda: upsampled_ops.upsample_nearest3d(array)),
    ]
    for name, refused in calls:
        with pytest.raises(
            InputError, match=rf"^{name}: expected a torch\.Tensor \(got (numpy\.ndarray|list)\)$"
        ):
            refused()


def test_other_operators_refuse_tensors_of_two_devices() -> None:
    """PyTorch takes the kernel of `meta`, which computes nothing, for all of them."""
    volume, weight = torch.ones(1, 1, 3, 3, 3), torch.ones(1, 1, 3, 3, 3, device="meta")
    norm = torch.ones(1, device="meta")
    geometry = {"stride": [1] * 3, "padding": [0] * 3, "dilation": [1] * 3}
    calls: list[tuple[str, Callable[[], object]]] = [
        (r"acc\[1\]", lambda: timm_ext.square_accumulate_([volume, weight], [volume, volume])),
        (r"grads\[0\]", lambda: timm_ext.square_accumulate_([volume], [weight])),
        ("input", lambda: timm_ext.conv_weight_grad_square_(volume, volume, weight, **geometry)),
        ("keys", lambda: timm_ext.sample_labels(volume, norm.long(), "bernoulli")),
        ("weight", lambda: layer_ops.small_conv3d(volume, weight, **geometry)),
        ("weight", lambda: layer_ops.winograd_conv3d(volume, weight, padding=[0] * 3)),
        ("weight", lambda: depthwise_ops.depthwise_conv3d(volume, weight, **geometry)),
        ("bias", lambda: depthwise_ops.depthwise_conv3d(volume, volume, norm, **geometry)),
        (
            "weight",
            lambda: depthwise_ops.depthwise_conv_transpose3d(volume, weight, **geometry, size=[5] * 3),
        ),
        ("weight", lambda: layer_ops.strided_conv3d_input_gradient(volume, weight, [6] * 3)),
        ("bias", lambda: norm_ops.batch_norm(volume, None, norm)),
        ("weight", lambda: upsampled_ops.upsampled_conv3d(volume, weight)),
        ("weight", lambda: upsampled_ops.upsampled_conv3d_input_gradient(volume, weight)),
    ]
    for name, refused in calls:
        with pytest.raises(
            InputError, match=rf"^{name}: expected a tensor on the device of .*, cpu \(got meta\)$"
        ):
            refused()


@pytest.mark.parametrize("device", ["cuda"], indirect=True)
@pytest.mark.parametrize("name", ["theta", "fisher", "offsets", "out"])
def test_tensors_of_another_device_are_named(name: str, device: torch.device) -> None:
    arguments = {**good(), "out": torch.empty(10)}
    moved = {other: tensor.to(device) for other, tensor in arguments.items() if other != name}
    with pytest.raises(InputError, match="expected a tensor on the device of theta"):
        call({**arguments, **moved})
