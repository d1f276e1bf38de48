"""What each arm starts from, in closed form."""

import pytest
import torch
from hand_merges import bank, network, values
from merged_model_samples import FisherStub
from torch import nn

from timm_ext.errors import InputError
from timm_ext.layout import Layout
from timm_ext.merging import Bank, MergedModel, logits_of
from timm_ext.merging.merge import MEAN, Merge
from timm_ext.transfer.arms import Adaptation, Arm, arms, get_arm
from timm_ext.transfer.settings import Recipe
from timm_ext.transfer.start import initialise


@pytest.mark.parametrize(
    ("name", "shared"),
    [
        ("scratch", [9, 9]),
        ("mode-imm", [(3 * 2 + 1 * 6) / 4, (10 + 30) / 2]),
        ("imm-warmup", [3, 20]),
        ("mean-imm-probe", [4, 20]),
        ("transfer-2-probe", [6, 30]),
        ("transfer-2-l2", [6, 30]),
        ("transfer-1-drop", [2, 10]),
    ],
)
def test_values_by_hand(name: str, shared: list[float]) -> None:
    net = network()
    made = initialise(name, net, bank())
    assert values(made) == [*shared, 9, 9]
    assert values(net) == [9, 9, 9, 9]
    assert all(p.requires_grad for p in made.parameters())


@pytest.mark.parametrize("name", ["t-imm", "t-imm-extra"])
def test_t_imm_by_hand(name: str) -> None:
    made = initialise(name, network(), bank(), initial_logits=logits_of(torch.tensor([0.25, 0.75])))
    assert isinstance(made, MergedModel)
    # weight: (1/4·3·2 + 3/4·1·6) / (3/4 + 3/4) = 4; bias: 1/4·10 + 3/4·30 = 25
    assert values(made.fold()) == pytest.approx([4, 25, 9, 9])


def test_an_annealed_merge_has_an_offset() -> None:
    made = initialise("t-imm-annealed", network(), bank())
    assert isinstance(made, MergedModel)
    assert made.offset is not None
    assert values(made.fold()) == [3, 20, 9, 9]
    with torch.no_grad():
        made.offset.copy_(torch.tensor([1.0, -2.0]))
    assert values(made.fold()) == [4, 18, 9, 9]
    assert initialise("t-imm", network(), bank()).offset is None


def test_t_imm_starts_as_mode_imm() -> None:
    made = initialise("t-imm", network(), bank())
    assert isinstance(made, MergedModel)
    assert values(made.fold()) == values(initialise("mode-imm", network(), bank()))


def test_where_ratios_are_learned_they_start_as_the_merge() -> None:
    for arm in arms().values():
        if arm.learns_ratios:
            assert arm.merge.weights is not None
            weights = arm.merge.weights(bank()).tolist()
            assert weights == ([3, 20] if arm.merge.needs_fisher else [4, 20])
            made = initialise(arm, network(), bank())
            assert isinstance(made, MergedModel)
            assert made.merge().tolist() == weights


def test_a_new_arm_is_one_line() -> None:
    kernels = Arm("kernels", "Kernel-wise", "a paper", MEAN, Adaptation(granularity="kernel"))
    made = initialise(kernels, network(), bank())
    assert isinstance(made, MergedModel)
    assert made.granularity == "kernel"
    assert values(made.fold()) == [4, 20, 9, 9]


def test_a_new_merge_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    largest = Merge("largest", "Largest", "a paper: θ* = max θ_t", lambda bank: bank.theta.amax(0))
    monkeypatch.setattr("timm_ext.merging.merge.MERGES", (MEAN, largest))
    assert get_arm("largest") == Arm.of(largest)
    assert values(initialise("largest", network(), bank())) == [6, 30, 9, 9]
    with pytest.raises(InputError, match=r"^x: expected a merge of all sources .* \(got largest\)$"):
        Arm("x", "X", "a paper", largest, Adaptation())


def convolutions() -> tuple[nn.Module, Bank]:
    """Two 1-D convolutions of 2 × 2 kernels of 1 element, M1 all 1 and M2 all 3, with Fishers of 1 and 3."""
    net = nn.Sequential(nn.Conv1d(2, 2, 1, bias=False))
    models = {f"M{n}": {"0.weight": torch.full((2, 2, 1), 2.0 * n - 1)} for n in (1, 2)}
    fishers = [FisherStub(tensors) for tensors in models.values()]
    return net, Bank.build(models, fishers, Layout.from_model(net, ["0.weight"]))


def test_medmerge_has_a_weight_for_each_kernel_and_no_fisher() -> None:
    net, sources = convolutions()
    logits = logits_of(torch.tensor([[0.5, 0.5], [0.25, 0.75], [0.75, 0.25], [0.1, 0.9]]))
    made = initialise("medmerge", net, sources, initial_logits=logits)
    assert isinstance(made, MergedModel)
    assert tuple(made.group_names) == ("0[0, 0]", "0[0, 1]", "0[1, 0]", "0[1, 1]")
    assert made.merge().tolist() == pytest.approx([2, 2.5, 1.5, 2.8])  # α_1 + 3 α_2


@pytest.mark.parametrize(("name", "groups"), [("t-imm", 1), ("t-imm-filter", 2), ("t-imm-kernel", 4)])
def test_t_imm_of_finer_groups_weighs_by_fishers(name: str, groups: int) -> None:
    made = initialise(name, *convolutions())
    assert isinstance(made, MergedModel)
    assert len(made.group_names) == groups
    assert made.merge().tolist() == pytest.approx([2.5] * 4)  # (1·1 + 3·3) / (1 + 3)


@pytest.mark.parametrize("mixing", ["sigmoid", "softmax", "ratios", "free"])
@pytest.mark.parametrize("anchor", [2.0, -2.0])
def test_an_anchor_lets_one_source_dominate(mixing: str, anchor: float) -> None:
    net, sources = convolutions()
    made = initialise("medmerge", net, sources, Recipe(mixing=mixing, anchor=anchor))
    assert isinstance(made, MergedModel)
    share = torch.sigmoid(torch.tensor(anchor * (2 if mixing == "softmax" else 1))).item()
    assert made.ratios()[:, 0].tolist() == pytest.approx([share] * 4)
    assert made.merge().tolist() == pytest.approx([share + 3 * (1 - share)] * 4)
    if mixing in ("sigmoid", "softmax"):
        assert made.logits[0].tolist() == [anchor, -anchor]


def test_given_logits_go_before_an_anchor() -> None:
    net, sources = convolutions()
    made = initialise("medmerge", net, sources, Recipe(anchor=9.0), torch.zeros(2))
    assert isinstance(made, MergedModel)
    assert made.ratios().eq(0.5).all()


def test_a_source_is_chosen_only_by_cases() -> None:
    with pytest.raises(InputError, match=r"^best-by-evidence: expected cases to choose by"):
        initialise("best-by-evidence", network(), bank())


def test_granularity_and_constraint_are_options() -> None:
    net, sources = convolutions()
    weights = torch.tensor([[-1.0, 2.0], [0.5, 0.0]])
    made = initialise("medmerge", net, sources, Recipe(granularity="filter", mixing="free"), weights)
    assert isinstance(made, MergedModel)
    assert made.merge().tolist() == [5, 5, 0.5, 0.5]  # −1 + 2·3 and 0.5, neither of them a mean


def test_free_weights_refuse_fishers() -> None:
    with pytest.raises(InputError, match="expected a bank without Fishers for 'free' weights"):
        initialise("t-imm-kernel", *convolutions(), Recipe(mixing="free"))


def test_what_is_missing_is_told_by_the_arms_name() -> None:
    with pytest.raises(InputError, match=r"t-imm: expected a bank with Fishers \(got one without\)"):
        initialise("t-imm", network(), bank().without_fisher())
    with pytest.raises(InputError, match=r"transfer-3-l2: expected at least 3 source models \(got 2\)"):
        initialise("transfer-3-l2", network(), bank())
    with pytest.raises(InputError, match=r"medmerge: expected at least 1 source models \(got 0\)"):
        initialise("medmerge", network(), None)
