import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from networks_for_tests import NormsAndHeads

from timm_ext.errors import InputError
from timm_ext.layout import Entry, Layout, check_compatible, compatibility_report
from timm_ext.parameters import named_parameters


def test_layout_from_model_knows_the_channel_axes() -> None:
    layout = Layout.from_model(NormsAndHeads(), ["conv.weight", "conv.bias", "up.weight"])
    assert layout.entries == (
        Entry("conv.weight", (4, 2, 3, 3, 3), "conv", 0, 1),
        Entry("conv.bias", (4,), "conv", 0, None),
        Entry("up.weight", (4, 3, 2, 2, 2), "up", 1, 0, channel_groups=2),
    )
    assert layout.offsets == (0, 216, 220)
    assert layout.numel == 316
    assert layout.entries[2].out_channels == 6


def test_layout_of_an_unknown_name_is_refused() -> None:
    with pytest.raises(InputError, match=r"expected names of the model's parameters \(got conv.wait\)"):
        Layout.from_model(NormsAndHeads(), ["conv.wait", "conv.bias"])


def test_layout_is_listed_as_json() -> None:
    layout = Layout.from_model(NormsAndHeads(), list(named_parameters(NormsAndHeads())))
    listed = json.loads(json.dumps(layout.to_list()))
    assert tuple(Entry(**{**entry, "shape": tuple(entry["shape"])}) for entry in listed) == layout.entries


shapes = st.lists(st.lists(st.integers(0, 3), max_size=4).map(tuple), min_size=1, max_size=6)


@given(shapes=shapes)
def test_flatten_and_split_are_inverse(shapes: list[tuple[int, ...]]) -> None:
    tensors = {f"layer{i}.weight": torch.randn(shape) for i, shape in enumerate(shapes)}
    layout = Layout.from_tensors(tensors)
    flat = layout.flatten(tensors)
    assert flat.shape == (layout.numel,)
    assert all(torch.equal(part, tensors[name]) for name, part in layout.split(flat).items())
    assert torch.equal(layout.flatten(tensors, out=torch.empty(layout.numel)), flat)


def test_split_is_differentiable_and_shares_memory() -> None:
    layout = Layout.from_tensors({"a": torch.zeros(2), "b": torch.zeros(1, 2)})
    flat = torch.arange(4.0, requires_grad=True)
    parts = layout.split(flat)
    (3 * parts["a"].sum() + (parts["b"] ** 2).sum()).backward()
    assert flat.grad.tolist() == [3.0, 3.0, 4.0, 6.0]
    assert parts["b"].data_ptr() == flat.data_ptr() + 8


def test_flatten_lists_all_that_do_not_fit() -> None:
    layout = Layout.from_tensors({"a": torch.zeros(2), "b": torch.zeros(3), "c": torch.zeros(1)})
    with pytest.raises(
        InputError, match=r"got 2 that differ\)\n  tensors: a: expected \[2\] \(got \[1\]\)\n.*b: .*got none"
    ):
        layout.flatten({"a": torch.zeros(1), "c": torch.zeros(1), "free": torch.zeros(9)})


def test_report_names_every_mismatch() -> None:
    models = {
        "M1": {"a": torch.zeros(2), "b": torch.zeros(3), "c": torch.zeros(1), "head": torch.zeros(1)},
        "M2": {
            "a": torch.zeros(2, 1),
            "c": torch.zeros(1).double(),
            "d": torch.zeros(5),
            "head": torch.zeros(2),
        },
        "M3": {"a": torch.zeros(2), "b": torch.zeros(3), "c": torch.zeros(1)},
    }
    assert compatibility_report(models, ignore=["head*"]) == [
        "M2: a: expected [2] as in M1 (got [2, 1])",
        "M2: b: expected [3] as in M1 (got none)",
        "M2: c: expected torch.float32 as in M1 (got torch.float64)",
        "M2: d: expected none as in M1 (got [5])",
    ]
    with pytest.raises(InputError, match=r"models: expected the same tensors \(got 6 that differ\)"):
        check_compatible(models)


def test_report_against_a_layout_refuses_integers() -> None:
    layout = Layout.from_tensors({"a": torch.zeros(2)})
    report = compatibility_report({"M1": {"a": torch.zeros(2, dtype=torch.int64)}}, layout=layout)
    assert report == ["M1: a: expected floating point (got torch.int64)"]


def test_equal_models_are_compatible() -> None:
    check_compatible({"M1": NormsAndHeads().state_dict(), "M2": NormsAndHeads().state_dict()})
    assert compatibility_report({}) == []
