import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from timm_ext.errors import InputError
from timm_ext.groups import GRANULARITIES, Groups, make_groups
from timm_ext.layout import Entry, Layout
from timm_ext.parameters import named_parameters


def layout_of(model: nn.Module) -> Layout:
    return Layout.from_model(model, list(named_parameters(model)))


def group_of_element(groups: Groups) -> torch.Tensor:
    return groups.rows.repeat_interleave(groups.offsets.diff())


def small() -> Layout:
    """A convolution [2, 3, 2] with bias and a norm of two channels: P = 12 + 2 + 2 + 2."""
    return layout_of(nn.Sequential(nn.Conv1d(3, 2, 2), nn.GroupNorm(1, 2)))


def test_model_is_one_segment() -> None:
    groups = make_groups(small(), "model")
    assert groups.offsets.tolist() == [0, 18]
    assert groups.rows.tolist() == [0]
    assert tuple(groups.names) == ("model",)


def test_layer_joins_weight_and_bias() -> None:
    groups = make_groups(small(), "layer")
    assert groups.offsets.tolist() == [0, 14, 18]
    assert groups.rows.tolist() == [0, 1]
    assert tuple(groups.names) == ("0", "1")


def test_filter_holds_its_bias() -> None:
    groups = make_groups(small(), "filter")
    assert groups.offsets.tolist() == [0, 6, 12, 13, 14, 15, 16, 17, 18]
    assert groups.rows.tolist() == [0, 1, 0, 1, 2, 3, 2, 3]
    assert tuple(groups.names) == ("0[0]", "0[1]", "1[0]", "1[1]")


def test_kernel_is_one_pair_of_channels() -> None:
    groups = make_groups(small(), "kernel")
    assert groups.offsets.tolist() == [0, 2, 4, 6, 8, 10, 12, 13, 14, 15, 16, 17, 18]
    assert groups.rows.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 8, 9]
    assert groups.names[:8] == (
        *("0[0, 0]", "0[0, 1]", "0[0, 2]", "0[1, 0]", "0[1, 1]", "0[1, 2]"),
        *("0.bias[0]", "0.bias[1]"),
    )
    assert groups.names[-1] == "1[1]"


def test_element_is_each_by_itself() -> None:
    groups = make_groups(small(), "element")
    assert groups.offsets.tolist() == list(range(19))
    assert groups.rows.tolist() == list(range(18))
    assert groups.names[5] == "0.weight[0, 2, 1]"


def test_transposed_convolution_has_its_filters_on_axis_one() -> None:
    # [in 4, out 3 per group, 1], two groups: rows 0, 1 make channels 0..2; rows 2, 3 make channels 3..5.
    layout = layout_of(nn.ConvTranspose1d(4, 6, 1, groups=2))
    groups = make_groups(layout, "filter")
    expected = [0, 1, 2, 0, 1, 2, 3, 4, 5, 3, 4, 5, 0, 1, 2, 3, 4, 5]
    assert group_of_element(groups).tolist() == expected


def test_kernel_of_a_transposed_convolution_is_named_output_first() -> None:
    groups = make_groups(layout_of(nn.ConvTranspose1d(2, 3, 5, bias=False)), "kernel")
    assert tuple(groups.names) == (
        *("weight[0, 0]", "weight[1, 0]", "weight[2, 0]"),
        *("weight[0, 1]", "weight[1, 1]", "weight[2, 1]"),
    )
    assert groups.offsets.diff().tolist() == [5] * 6


def test_neighbours_of_one_group_are_joined_across_tensors() -> None:
    layout = Layout(
        (
            Entry("a.x", (2,), "a", 0, None),
            Entry("empty", (0, 3), "", 0, 1),
            Entry("a.y", (), "a", None, None),
        )
    )
    groups = make_groups(layout, "layer")
    assert groups.offsets.tolist() == [0, 3]


def test_unknown_granularity_is_refused() -> None:
    with pytest.raises(InputError, match=r"granularity: expected one of model, layer, .* \(got 'row'\)"):
        make_groups(small(), "row")


def test_empty_layout_is_refused() -> None:
    with pytest.raises(InputError, match="expected at least one element"):
        make_groups(Layout(()), "layer")


shapes = st.lists(st.lists(st.integers(0, 3), max_size=4).map(tuple), min_size=1, max_size=6)


@given(shapes=shapes, granularity=st.sampled_from(GRANULARITIES))
def test_segments_cover_the_layout_once(shapes: list[tuple[int, ...]], granularity: str) -> None:
    layout = Layout.from_tensors(
        {f"layer{i // 2}.p{i}": torch.zeros(shape) for i, shape in enumerate(shapes)}
    )
    if layout.numel == 0:
        return
    groups = make_groups(layout, granularity)
    assert groups.offsets[0] == 0
    assert groups.offsets[-1] == layout.numel
    assert (groups.offsets.diff() > 0).all()
    assert sorted(set(groups.rows.tolist())) == list(range(len(groups.names)))
    assert (groups.rows.diff() != 0).all()
    assert len(set(groups.names)) == len(groups.names)


def test_hundreds_of_thousands_of_kernels_take_a_moment() -> None:
    layout = Layout.from_tensors(
        {f"{i}.weight": torch.empty(256, 256, 3, 3, 3, device="meta") for i in range(5)}
    )
    start = time.process_time()  # of this process alone: others may hold the cores
    groups = make_groups(layout, "kernel")
    assert time.process_time() - start < 0.5  # 0.01 s; a Python loop over the kernels takes over a second
    assert len(groups.names) == len(groups.rows) == 327_680
