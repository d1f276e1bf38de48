"""Odd input of an update or an estimate: right, or one line that names it; nothing is added."""

import numpy as np
import pytest
import torch
from torch import nn

from timm_ext.errors import InputError
from timm_ext.fisher import FisherAccumulator, estimate_fisher

X = torch.randn(2, 2, 5, 5, 5, generator=torch.Generator().manual_seed(0))
Y = (X[:, :1] > 0).float()
IDS = ["a", "b"]


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv3d(2, 3, 3, padding=1), nn.InstanceNorm3d(3, affine=True), nn.Conv3d(3, 1, 1))


def fisher(x=X, y=Y, ids=IDS, **options):
    accumulator = FisherAccumulator(network(), **{"labels": "true", **options})
    with accumulator:
        accumulator.update(x, y, ids)
    return accumulator.result()


def assert_expected(got) -> None:
    expected = fisher()
    assert got.count == expected.count
    for name, tensor in expected.tensors.items():
        torch.testing.assert_close(got.tensors[name], tensor, rtol=1e-5, atol=1e-9, msg=name)


ODD = {
    "an array": ({"x": X.numpy()}, r"x: expected a tensor \[B, \.\.\.\] .*\(got ndarray; torch\.from_numpy"),
    "a list": ({"x": X.tolist()}, r"x: expected a tensor .*\(got list\)"),
    "nothing": ({"x": None}, r"x: expected a tensor .*\(got NoneType\)"),
    "a scalar": ({"x": torch.tensor(1.0)}, r"x: expected a tensor .*\(got shape \[\]\)"),
    "one image": ({"x": X[0]}, r"model: expected images that it takes \(got \[1, 5, 5, 5\], torch\.float32"),
    "too few axes": (
        {"x": X[:, 0, 0]},
        r"expected images .*\(got \[1, 5, 5\].*RuntimeError: Expected",
    ),
    "channels": (
        {"x": X.repeat(1, 2, 1, 1, 1)},
        r"expected images .*\(got \[1, 4, 5, 5, 5\].*channels",
    ),
    "integers": ({"x": (10 * X).int()}, r"model: expected images .*torch\.int32, .*expected scalar type"),
    "bytes": ({"x": (10 * X).byte()}, r"model: expected images .*torch\.uint8"),
    "booleans": ({"x": X > 0}, r"model: expected images .*torch\.bool"),
    "doubles": ({"x": X.double()}, r"model: expected images .*torch\.float64"),
    "complex": ({"x": X.to(torch.complex64)}, r"x: expected a dense tensor of real .*torch\.complex64"),
    "sparse": ({"x": X.to_sparse()}, r"x: expected a dense tensor .*torch\.sparse_coo"),
    "meta": ({"x": X.to("meta")}, r"x: expected a dense tensor .*on meta"),
    "no ids": ({"ids": None}, r"ids: expected 2 strings, one for each example \(got NoneType\)"),
    "a number": ({"ids": 3}, r"ids: expected 2 strings, .*\(got int\)"),
    "numbers": ({"ids": [1, 2]}, r"ids: expected 2 strings, .*\(got 2: 1, 2\)"),
    "a text": ({"ids": "ab"}, r"ids: expected 2 strings, .*\(got 1: 'ab'\)"),
    "many ids": ({"ids": [str(n) for n in range(99)]}, r"\(got 99: '0', .*'9', and 89 more\)"),
    "no labels": ({"y": None}, r"y: expected shape \[2, 1, 5, 5, 5\] \(got NoneType\)"),
    "label array": ({"y": Y.numpy()}, r"y: expected shape .*\(got ndarray\)"),
    "fewer labels": ({"y": Y[:1]}, r"y: expected shape .*\(got \[1, 1, 5, 5, 5\]\)"),
    "NaN labels": ({"y": Y * float("nan")}, r"y: expected labels 0 or 1 \(got nan in example a\)"),
    "a loss": (
        {"likelihood": lambda z, y: z.sum()},
        r"one value for each example, \[2\] .*shape \[\]\)",
    ),
    "a float": ({"likelihood": lambda z, y: 3.0}, r"one value for each example, \[2\] \(got float\)"),
    "a seed": ({"seed": "x"}, r"seed: expected a whole number \(got 'x'\)"),
    "half a seed": ({"seed": 1.5}, r"seed: expected a whole number \(got 1\.5\)"),
    "samples": ({"samples": True}, r"samples: expected at least 1 \(got True\)"),
}


@pytest.mark.parametrize("what", ODD)
def test_odd_input_of_an_update(what: str) -> None:
    change, message = ODD[what]
    with pytest.raises(InputError, match=message) as error:
        fisher(**change)
    assert "\n" not in str(error.value)


def test_nothing_is_added_by_a_refused_update() -> None:
    accumulator = FisherAccumulator(network(), labels="true")
    with accumulator:
        for what in ("one image", "integers", "fewer labels", "NaN labels"):
            with pytest.raises(InputError):
                accumulator.update(**{"x": X, "y": Y, "ids": IDS, **ODD[what][0]})
        accumulator.update(X, Y, IDS)
    assert_expected(accumulator.result())


MODELS = {
    "a function": (lambda: lambda x: x, r"expected a torch\.nn\.Module \(got function\)"),
    "nothing": (lambda: None, r"expected a torch\.nn\.Module \(got NoneType\)"),
    "a state": (lambda: network().state_dict(), r"expected a torch\.nn\.Module \(got OrderedDict\)"),
    "no parameters": (lambda: nn.ReLU(), r"expected parameters that require gradients \(got none"),
    "frozen": (lambda: network().requires_grad_(False), r"require gradients \(got none: a frozen network"),
    "on meta": (lambda: network().to("meta"), r"expected parameters with values \(got 0\.weight on meta"),
}


@pytest.mark.parametrize("what", MODELS)
@pytest.mark.parametrize("strict", [False, True])
def test_odd_models(what: str, strict: bool) -> None:
    make, message = MODELS[what]
    with pytest.raises(InputError, match=message):
        FisherAccumulator(make(), strict=strict)


def test_modes_of_the_caller() -> None:
    """Without gradients and under autocast it is the same; inference mode leaves no graph."""
    expected = fisher()
    with torch.no_grad():
        without = fisher()
    with torch.autocast("cpu", torch.bfloat16):
        mixed = fisher()
    with torch.inference_mode():
        images = X + 0
        model = network()
    inferred = fisher(x=images)
    for got in (without, mixed, inferred):
        assert all(torch.equal(got.tensors[name], tensor) for name, tensor in expected.tensors.items())
    with pytest.raises(InputError, match=r"ordinary parameters \(got 0\.weight made in torch\.inf"):
        FisherAccumulator(model)
    accumulator = FisherAccumulator(network())
    with accumulator, torch.inference_mode(), pytest.raises(InputError, match=r"outside torch\.inference"):
        accumulator.update(X, None, IDS)


@pytest.mark.parametrize("batch_size", [1, 2])
def test_a_list_of_examples_is_a_data_set(batch_size: int) -> None:
    for data in (
        [{"id": id, "image": x, "target": y} for id, x, y in zip(IDS, X, Y, strict=True)],
        [(x, y, id) for id, x, y in zip(IDS, X, Y, strict=True)],
        [(x.numpy(), y.numpy(), id) for id, x, y in zip(IDS, X, Y, strict=True)],
        tuple({"id": id, "image": x, "target": y} for id, x, y in zip(IDS, X, Y, strict=True)),
    ):
        assert_expected(estimate_fisher(network(), data, labels="true", batch_size=batch_size))


def test_a_list_of_batches_is_taken_as_it_is() -> None:
    for data in ([(X, Y, IDS)], [{"id": IDS, "image": X, "target": Y}], iter([(X, Y, tuple(IDS))])):
        assert_expected(estimate_fisher(network(), data, labels="true"))


def test_labels_that_are_not_read_may_be_anything() -> None:
    data = [(x, None, id) for id, x in zip(IDS, X, strict=True)]
    assert estimate_fisher(network(), data, batch_size=2).count == 2


ODD_DATA = {
    "tensors": (
        [X[0]],
        r"batch: expected a mapping with image, target and id, .*\(got Tensor\)",
    ),
    "arrays": ([X[0].numpy()], r"batch: expected a mapping .*\(got ndarray\)"),
    "an array": (np.zeros((1, 2, 5, 5, 5)), r"batch: expected a mapping .*\(got ndarray\)"),
    "a tensor": (X, r"data: expected a data set or batches \(got Tensor\)"),
    "nothing": (None, r"data: expected a data set or batches \(got NoneType\)"),
    "a folder": ("data/", r"data: expected a data set or batches \(got str\)"),
    "files": (["a.nii.gz"], r"batch: expected a mapping .*\(got str\)"),
    "one batch": ({"id": IDS, "image": X}, r"batch: expected a mapping .*\(got str\)"),
    "pairs": ([(X, Y)], r"batch: expected a mapping .*\(got 2 values\)"),
    "lists": ([(X.tolist(), Y, IDS)], r"x: expected a tensor .*\(got list\)"),
    "empty": ([], r"Fisher: expected at least one example \(got none\)"),
    "no id": ([{"image": X}], r"batch: expected image, target and id \(got none of id, target\)"),
    "no labels": ([(X[0], None, "a")], r"batch: expected targets as tensors .*\(got NoneType\)"),
    "twice": ([(X[0], Y[0], "a"), (X[1], Y[1], "a")], r"example a: expected once"),
}


@pytest.mark.parametrize("what", ODD_DATA)
def test_odd_data(what: str) -> None:
    data, message = ODD_DATA[what]
    with pytest.raises(InputError, match=message) as error:
        estimate_fisher(network(), data, labels="true")
    assert "\n" not in str(error.value)


def test_labels_of_another_length_beside_a_partial_file(tmp_path) -> None:
    with pytest.raises(InputError, match=r"y: expected shape"):
        estimate_fisher(network(), [(X, Y[:1], IDS)], labels="true", partial=tmp_path / "F")
