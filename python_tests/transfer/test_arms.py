import pytest

from timm_ext.errors import InputError
from timm_ext.merging.merge import MEAN, MODE, merges
from timm_ext.transfer.arms import Adaptation, Arm, FineTuning, arms, beyond, get_arm


def test_names_for_two_models() -> None:
    assert tuple(arms(1, 2)) == (
        "scratch",
        "transfer-1",
        "transfer-2",
        "transfer-1-probe",
        "transfer-2-probe",
        "transfer-1-l2",
        "transfer-2-l2",
        "transfer-1-drop",
        "transfer-2-drop",
        "mean-imm",
        "mode-imm",
        "mode-imm-normalized",
        "mean-imm-probe",
        "imm-warmup",
        "t-imm",
        "t-imm-extra",
        "t-imm-norms",
        "t-imm-filter",
        "t-imm-kernel",
        "t-imm-normalized",
        "t-imm-annealed",
        "medmerge",
        "mean-aligned",
        "mode-imm-aligned",
        "medmerge-aligned",
    )
    assert all(get_arm(name) == arm for name, arm in arms(1, 2, 3, 12).items())
    assert all(arm.name == name for name, arm in arms(1, 2).items())


def test_every_arm_says_what_it_is() -> None:
    table = arms(1, 2)
    for name, arm in table.items():
        assert arm.title
        assert arm.paper
        assert arm.merge.needs_fisher == ("imm" in name and not name.startswith("mean"))
        assert arm.merge.aligned == name.endswith("-aligned")
        assert arm.merge.transfer_norms == (name == "t-imm-norms")
        assert (arm.merge.normalize == "tensor") == name.endswith("-normalized")
        assert ("l2_transfer" in arm.tuning.ties()) == name.endswith("-l2")
        assert ("drop_transfer" in arm.tuning.ties()) == name.endswith("-drop")
        assert (arm.tuning.weight_pull > 0) == (name == "t-imm-annealed")
        warm_up = name.endswith("-probe") or name == "imm-warmup"
        assert (arm.adaptation is not None and not arm.adaptation.ratios) == warm_up
        assert arm.learns == (arm.learns_ratios or warm_up)
    adapted = {
        name: arm.adaptation for name, arm in table.items() if arm.adaptation and arm.adaptation.ratios
    }
    assert adapted == {
        "t-imm": Adaptation(),
        "t-imm-extra": Adaptation(extra_steps=True),
        "t-imm-norms": Adaptation(),
        "t-imm-filter": Adaptation(granularity="filter"),
        "t-imm-kernel": Adaptation(granularity="kernel"),
        "t-imm-normalized": Adaptation(),
        "medmerge": Adaptation(granularity="kernel"),
        "medmerge-aligned": Adaptation(granularity="kernel"),
    }
    assert {n for n, arm in table.items() if arm.learns_ratios} == {*adapted, "t-imm-annealed"}


def test_a_merge_alone_is_an_arm_of_its_name() -> None:
    table = arms(1, 2, 3)
    assert all(table[name] == Arm.of(merge) for name, merge in merges(1, 2, 3).items())


def test_a_transfer_is_numbered_from_one() -> None:
    arm = get_arm("transfer-12-drop")
    assert arm.title == "Transfer from M12, drop-transfer"
    assert (arm.merge.models, arm.tuning) == (12, FineTuning(drop_transfer=0.5))


def test_arms_of_one_merge_differ_in_the_rest() -> None:
    assert get_arm("t-imm").merge is get_arm("imm-warmup").merge is MODE
    assert get_arm("medmerge").merge is MEAN


@pytest.mark.parametrize(
    "name",
    ["timm", "transfer-0", "transfer-x", "transfer", "transfer--1", "transfer-probe", "transfer-1-prob"],
)
def test_an_unknown_arm_lists_the_known_ones(name: str) -> None:
    with pytest.raises(
        InputError, match=rf"method: expected one of scratch, .*mean-imm, .*t-imm.*soup.* \(got '{name}'\)"
    ):
        get_arm(name)


def test_what_only_a_study_makes_is_told() -> None:
    for name in ("transfer-joint", "transfer-3-all"):
        with pytest.raises(InputError, match=f"method: {name} starts from a network trained on all source "):
            get_arm(name)
    for name in ("soup", "ensemble"):
        with pytest.raises(InputError, match=f"method: {name} combines fine-tuned networks"):
            get_arm(name)
    assert not {*beyond(1, 2)} & {*arms(1, 2)}
