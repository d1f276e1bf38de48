import pytest
import torch

from timm_ext.errors import InputError
from timm_ext.networks.channels import FIXED, ChannelMap, Slots


def pair() -> ChannelMap:
    """Layer `a` of four channels, of which a norm takes two together, into layer `b`, twice over."""
    slots = Slots()
    images = slots.new(2)
    slots.mark(images, FIXED)
    slots.occupy("a.weight", 1, images)
    made = slots.made_by("a.weight", 0, 4)
    slots.normalise("norm", made, 2)
    slots.occupy("b.weight", 1, [*made, *made])
    return slots.channel_map()


def test_positions_and_blocks() -> None:
    channels = pair()
    assert list(channels.groups) == ["a"]
    assert channels.groups["a"].blocks.tolist() == [[0, 1], [2, 3]]
    assert {(a.tensor, a.axis): a.positions["a"].tolist() for a in channels.axes} == {
        ("a.weight", 0): [[0], [1], [2], [3]],
        ("b.weight", 1): [[0, 4], [1, 5], [2, 6], [3, 7]],
    }


def test_permute_by_hand() -> None:
    tensors = {"a.weight": torch.arange(8).view(4, 2), "b.weight": torch.arange(8)[None], "c": torch.ones(1)}
    permuted = pair().permute(tensors, {"a": torch.tensor([3, 2, 0, 1])})
    assert permuted["a.weight"].tolist() == [[6, 7], [4, 5], [0, 1], [2, 3]]
    assert permuted["b.weight"].tolist() == [[3, 2, 0, 1, 7, 6, 4, 5]]
    assert permuted["c"] is tensors["c"]
    assert tensors["a.weight"].tolist() == [[0, 1], [2, 3], [4, 5], [6, 7]]


def test_groups_left_out_stay() -> None:
    tensors = {"a.weight": torch.arange(8).view(4, 2)}
    assert pair().permute(tensors, {})["a.weight"] is tensors["a.weight"]


@pytest.mark.parametrize(
    ("permutations", "message"),
    [
        ({"b": [0, 1, 2, 3]}, r"permutations: expected groups of the network \(got 'b'\)"),
        ({"a": [0, 1, 2, 2]}, "a: expected a permutation of 4 channels"),
        ({"a": [0, 1, 2]}, "a: expected a permutation of 4 channels"),
        ({"a": [0, 2, 1, 3]}, "a: expected whole blocks of 2 channels to move"),
    ],
)
def test_wrong_permutations_are_refused(permutations: dict[str, list[int]], message: str) -> None:
    with pytest.raises(InputError, match=message):
        pair().permute({}, {name: torch.tensor(values) for name, values in permutations.items()})


def test_tensors_of_another_shape_are_refused() -> None:
    with pytest.raises(
        InputError, match=r"a.weight: expected 4 channels along axis 0 \(got shape \[3, 2\]\)"
    ):
        pair().permute({"a.weight": torch.ones(3, 2)}, {"a": torch.tensor([1, 0, 2, 3])})


def test_a_layer_used_with_other_channels_is_refused() -> None:
    slots = Slots()
    slots.occupy("a.weight", 1, slots.new(2))
    with pytest.raises(InputError, match=r"a.weight: expected 2 channels in all its uses \(got 3\)"):
        slots.occupy("a.weight", 1, slots.new(3))
