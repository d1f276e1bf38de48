import pytest
import torch
from networks_for_tests import NormsAndHeads
from torch import nn

from timm_ext.errors import InputError
from timm_ext.parameters import named_parameters, parameter_aliases, split_parameters


def test_named_parameters_without_aliases_is_the_module_list() -> None:
    net = NormsAndHeads()
    assert list(named_parameters(net)) == [name for name, _ in net.named_parameters()]


def test_doubly_registered_module_counts_once() -> None:
    # A decoder that holds the encoder, as in dynamic-network-architectures: 6 keys, 4 parameters.
    net = nn.Module()
    net.encoder = nn.Conv1d(1, 1, 1)
    net.decoder = nn.Module()
    net.decoder.encoder = net.encoder
    net.decoder.last = nn.Conv1d(1, 1, 1)
    assert len(net.state_dict()) == 6
    assert list(named_parameters(net)) == [
        "encoder.weight",
        "encoder.bias",
        "decoder.last.weight",
        "decoder.last.bias",
    ]
    assert parameter_aliases(net)["decoder.encoder.weight"] == "encoder.weight"


@pytest.mark.parametrize("view", [lambda w: w, lambda w: w.t(), lambda w: w.view(-1)])
def test_views_of_one_memory_are_one_parameter(view) -> None:
    net = nn.Module()
    net.a = nn.Linear(3, 2, bias=False)
    net.b = nn.Module()
    net.b.weight = nn.Parameter(view(net.a.weight.data))
    assert net.a.weight is not net.b.weight
    assert list(named_parameters(net)) == ["a.weight"]


def test_disjoint_parts_of_one_storage_are_separate_parameters() -> None:
    flat = torch.zeros(5)
    net = nn.ParameterDict({"a": nn.Parameter(flat[:2]), "b": nn.Parameter(flat[2:])})
    assert list(named_parameters(net)) == ["a", "b"]


def test_partial_overlap_is_refused_by_name() -> None:
    flat = torch.zeros(5)
    net = nn.ParameterDict({"a": nn.Parameter(flat[:3]), "b": nn.Parameter(flat[2:])})
    with pytest.raises(
        InputError, match=r"b: expected memory of its own \(got memory that overlaps a in part\)"
    ):
        named_parameters(net)


def test_meta_and_empty_parameters_are_told_apart() -> None:
    net = nn.Sequential(nn.Linear(2, 2, device="meta"), nn.Linear(2, 2, device="meta"))
    net.empty = nn.Parameter(torch.zeros(0))
    net.other = nn.Parameter(torch.zeros(0))
    assert len(named_parameters(net)) == 6


def test_lazy_parameter_is_refused() -> None:
    with pytest.raises(InputError, match=r"0\.weight: expected a parameter with a shape \(got a lazy one"):
        named_parameters(nn.Sequential(nn.LazyConv3d(2, 1)))


def test_heads_and_norms_are_task_specific_by_default() -> None:
    split = split_parameters(NormsAndHeads(), heads=["head*."])
    assert split.shared == ("conv.weight", "conv.bias", "up.weight")
    assert split.specific == (
        *("norm.weight", "norm.bias", "group_norm.weight", "group_norm.bias"),
        *("head1.weight", "head1.bias", "head2.weight", "head2.bias"),
    )


def test_transferred_norms_are_shared() -> None:
    split = split_parameters(NormsAndHeads(), heads=["head*.weight", "head?.bias"], transfer_norms=True)
    assert set(split.shared) >= {"norm.weight", "group_norm.bias"}
    assert split.specific == ("head1.weight", "head1.bias", "head2.weight", "head2.bias")


@pytest.mark.parametrize(
    "norm",
    [
        nn.InstanceNorm2d(3, affine=True),
        nn.BatchNorm3d(3),
        nn.GroupNorm(1, 3),
        nn.LayerNorm(3),
        nn.RMSNorm(3),
    ],
)
def test_every_norm_is_found(norm: nn.Module) -> None:
    net = nn.Sequential(nn.Conv1d(3, 3, 1), norm, nn.Conv1d(3, 1, 1))
    assert set(split_parameters(net, heads=["2."]).specific) >= {
        f"1.{name}" for name, _ in norm.named_parameters()
    }


def test_own_norm_class_is_found_by_its_name() -> None:
    class MyLayerNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.ones(3))

    net = nn.Sequential(nn.Conv1d(3, 3, 1), MyLayerNorm())
    assert split_parameters(net, heads=[]).specific == ("1.gain",)


def test_a_head_under_its_second_name_is_still_a_head() -> None:
    net = nn.Module()
    net.body = nn.Linear(2, 2)
    net.last = nn.Linear(2, 2)
    net.head = net.last
    assert split_parameters(net, heads=["head."]).specific == ("last.weight", "last.bias")


def test_pattern_without_a_match_is_refused() -> None:
    with pytest.raises(
        InputError, match=r"heads: expected patterns .* \(got 'haed\*', which match none of conv.weight"
    ):
        split_parameters(NormsAndHeads(), heads=["haed*", "head*."])


def test_nothing_left_to_share_is_refused() -> None:
    with pytest.raises(InputError, match="expected at least one shared parameter to remain"):
        split_parameters(NormsAndHeads(), heads=["*"])
