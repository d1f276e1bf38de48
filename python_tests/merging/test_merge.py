import pytest
import torch
from hand_merges import bank, network, values
from torch import nn

from timm_ext.errors import InputError
from timm_ext.layout import Layout
from timm_ext.merging.bank import Bank
from timm_ext.merging.initialise import assemble_bank, build_initialisation
from timm_ext.merging.merge import get_merge, merges
from timm_ext.merging.merged_model import MergedModel
from timm_ext.parameters import split_parameters


@pytest.mark.parametrize(
    ("name", "shared"),
    [
        ("scratch", [9, 9]),
        ("transfer-1", [2, 10]),
        ("transfer-2", [6, 30]),
        ("mean-imm", [(2 + 6) / 2, (10 + 30) / 2]),
        ("mode-imm", [(3 * 2 + 1 * 6) / 4, (10 + 30) / 2]),
    ],
)
def test_values_by_hand(name: str, shared: list[float]) -> None:
    net = network()
    made = build_initialisation(name, net, bank())
    assert values(made) == [*shared, 9, 9]
    assert values(net) == [9, 9, 9, 9]
    assert all(p.requires_grad for p in made.parameters())


def test_every_merge_has_its_name_a_title_and_a_source() -> None:
    for name, merge in merges(1, 2).items():
        assert get_merge(name) is merge
        assert merge.name == name
        assert merge.title
        assert merge.paper


# Fishers, least number of models, alignment, scaling of Fishers.
FACTS = {
    "scratch": (False, 0, False, None),
    "transfer-1": (False, 1, False, None),
    "transfer-2": (False, 2, False, None),
    "mean-imm": (False, 1, False, None),
    "mode-imm": (True, 1, False, None),
    "mode-imm-normalized": (True, 1, False, "tensor"),
    "mean-aligned": (False, 1, True, None),
    "mode-imm-aligned": (True, 1, True, None),
}


@pytest.mark.parametrize("name", FACTS)
def test_what_a_merge_needs(name: str) -> None:
    merge = get_merge(name)
    assert (merge.needs_fisher, merge.models, merge.aligned, merge.normalize) == FACTS[name]
    assert not merge.transfer_norms


@pytest.mark.parametrize(
    "name", ["t-imm", "transfer-0", "transfer-01", "transfer-x", "transfer-²", "transfer-11111111"]
)
def test_an_unknown_merge_lists_the_known_ones(name: str) -> None:
    known = "scratch, transfer-1, transfer-2, mean-imm, mode-imm"
    with pytest.raises(InputError, match=rf"method: expected one of {known}, .* \(got '{name}'\)"):
        get_merge(name)


def test_scratch_needs_no_bank() -> None:
    assert values(build_initialisation("scratch", network(), None)) == [9, 9, 9, 9]


def test_too_few_models_are_refused() -> None:
    with pytest.raises(InputError, match=r"transfer-3: expected at least 3 source models \(got 2\)"):
        build_initialisation("transfer-3", network(), bank())
    with pytest.raises(InputError, match=r"transfer-99999: expected at least 99999 source models \(got 2\)"):
        build_initialisation("transfer-99999", network(), bank())
    with pytest.raises(InputError, match=r"mean-imm: expected at least 1 source models \(got 0\)"):
        build_initialisation("mean-imm", network(), None)


def test_missing_fishers_are_refused() -> None:
    with pytest.raises(InputError, match=r"mode-imm: expected a bank with Fishers \(got one without\)"):
        build_initialisation("mode-imm", network(), bank().without_fisher())
    merge = get_merge("mode-imm")
    assert merge.weights is not None
    with pytest.raises(InputError, match="expected a bank with Fishers"):
        merge.weights(bank().without_fisher())


def test_network_that_does_not_fit_is_refused() -> None:
    net = nn.Sequential()
    net.add_module("body", nn.Linear(2, 1))
    with pytest.raises(InputError, match=r"network: body.weight: expected \[1, 1\] \(got \[1, 2\]\)"):
        build_initialisation("mean-imm", net, bank())


class Segmenter(nn.Module):
    def __init__(self, modalities: int, regions: int) -> None:
        super().__init__()
        self.enter = nn.Conv1d(modalities, 2, 1, bias=False)
        self.norm = nn.InstanceNorm1d(2, affine=True)
        self.head = nn.Conv1d(2, regions, 1)


def test_transferred_norms_are_groups_of_their_own() -> None:
    """Weight and bias of a norm share a row of logits, which is not that of the convolution before it."""
    target = Segmenter(1, 1)
    sources = {f"M{n}": Segmenter(1, 1).state_dict() for n in (1, 2)}
    split = split_parameters(target, heads=["head."], transfer_norms=True)
    made = Bank.build(sources, None, Layout.from_model(target, split.shared))
    merged = MergedModel(target, made)
    assert tuple(merged.group_names) == ("enter", "norm")
    with torch.no_grad():
        merged.logits.copy_(torch.tensor([[0.0, 0.0], [9.0, -99.0]]))
    folded = merged.fold()
    assert torch.equal(folded.norm.weight, sources["M1"]["norm.weight"])
    assert not torch.equal(folded.enter.weight, sources["M1"]["enter.weight"])


def test_bank_of_networks_with_other_tasks() -> None:
    target = Segmenter(3, 3)
    sources = {"M1": Segmenter(2, 5), "M2": Segmenter(2, 7)}
    with torch.no_grad():
        target.enter.weight[:, 1] = torch.tensor([[10.0], [20.0]])
        sources["M1"].enter.weight.copy_(torch.tensor([[1.0, 2.0], [3.0, 4.0]])[:, :, None])
        sources["M2"].enter.weight.copy_(torch.tensor([[5.0, 6.0], [7.0, 8.0]])[:, :, None])
    made = assemble_bank(
        target,
        {name: net.state_dict() for name, net in sources.items()},
        None,
        split=split_parameters(target, heads=["head."]),
        source_modalities=[["T1", "T2"], ["T2", "T1"]],
        target_modalities=["T1", "T1c", "T2"],
        input_layers=["enter.weight"],
    )
    assert made.theta.tolist() == [[1, 10, 2, 3, 20, 4], [6, 10, 5, 8, 20, 7]]
    assert made.fisher is None


def test_bank_names_what_differs_beyond_the_task() -> None:
    target, other = Segmenter(1, 1), Segmenter(1, 1)
    other.extra = nn.Conv1d(1, 1, 1)
    with pytest.raises(InputError, match=r"M2: extra.weight: expected none as in M1 \(got \[1, 1, 1\]\)"):
        assemble_bank(
            target,
            {"M1": target.state_dict(), "M2": other.state_dict()},
            None,
            split=split_parameters(target, heads=["head."]),
            source_modalities=[["T1"], ["T1"]],
            target_modalities=["T1"],
            input_layers=["enter.weight"],
        )


@pytest.mark.parametrize(
    ("modalities", "fishers", "message"),
    [
        ([["T1"]], None, r"modalities: expected those of each of 2 models \(got 1 lists\)"),
        ([["T1"], ["T1"]], [], r"bank: expected one Fisher for each of 2 models \(got 0\)"),
    ],
)
def test_wrong_numbers_of_sources_are_refused(
    modalities: list[list[str]], fishers: list | None, message: str
) -> None:
    target = Segmenter(1, 1)
    with pytest.raises(InputError, match=message):
        assemble_bank(
            target,
            {"M1": target.state_dict(), "M2": target.state_dict()},
            fishers,
            split=split_parameters(target, heads=["head."]),
            source_modalities=modalities,
            target_modalities=["T1"],
            input_layers=["enter.weight"],
        )
