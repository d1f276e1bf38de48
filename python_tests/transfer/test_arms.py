import re
from dataclasses import replace
from pathlib import Path

import pytest

from timm_ext.errors import InputError
from timm_ext.merging.merge import (
    MEAN,
    MEAN_ALIGNED,
    MODE,
    MODE_ALIGNED,
    MODE_NORMALIZED,
    SCRATCH,
    Merge,
    merges,
    transfer,
)
from timm_ext.transfer.arms import Adaptation, Arm, FineTuning, arms, beyond, get_arm

# What each arm beyond a merge is made of; a transfer stands for those of all numbers.
MADE_OF: dict[str, tuple[Merge, Adaptation | None, FineTuning]] = {
    "best-by-evidence": (transfer(1), None, FineTuning()),
    "transfer-2-probe": (transfer(2), Adaptation(ratios=False), FineTuning()),
    "transfer-2-l2": (transfer(2), None, FineTuning(l2_transfer=1e-2)),
    "transfer-2-drop": (transfer(2), None, FineTuning(drop_transfer=0.5)),
    "transfer-2-ewc": (replace(transfer(2), needs_fisher=True), None, FineTuning(prior_cases=4.0)),
    "mode-imm-posterior": (MODE, None, FineTuning(prior_cases=4.0)),
    "mode-imm-isotropic": (MODE, None, FineTuning(prior_cases=4.0, isotropic=True)),
    "mean-imm-probe": (MEAN, Adaptation(ratios=False), FineTuning()),
    "imm-warmup": (MODE, Adaptation(ratios=False), FineTuning()),
    "t-imm": (MODE, Adaptation(), FineTuning()),
    "t-imm-extra": (MODE, Adaptation(extra_steps=True), FineTuning()),
    "t-imm-norms": (replace(MODE, transfer_norms=True), Adaptation(), FineTuning()),
    "t-imm-filter": (MODE, Adaptation(granularity="filter"), FineTuning()),
    "t-imm-kernel": (MODE, Adaptation(granularity="kernel"), FineTuning()),
    "t-imm-normalized": (MODE_NORMALIZED, Adaptation(), FineTuning()),
    "t-imm-annealed": (MODE, None, FineTuning(weight_pull=1e-2)),
    "medmerge": (MEAN, Adaptation(granularity="kernel"), FineTuning()),
    "medmerge-aligned": (MEAN_ALIGNED, Adaptation(granularity="kernel"), FineTuning()),
}


@pytest.mark.parametrize("name", MADE_OF)
def test_what_an_arm_is_made_of(name: str) -> None:
    arm = get_arm(name)
    assert (arm.merge, arm.adaptation, arm.tuning) == MADE_OF[name]
    learned = name.startswith(("t-imm", "medmerge"))
    assert arm.learns_ratios == learned
    trained = name.endswith(("-probe", "-warmup", "-ewc", "-posterior", "-isotropic"))
    assert arm.learns == (learned or trained or name == "best-by-evidence")
    assert arm.tunes == name.endswith(("-annealed", "-ewc", "-posterior", "-isotropic"))


def test_every_arm_has_its_name_a_title_and_a_source() -> None:
    table = arms(1, 2, 3, 12)
    assert len({arm.title for arm in table.values()}) == len(table)
    for name, arm in table.items():
        assert get_arm(name) == arm
        assert arm.name == name
        assert arm.paper


def test_the_page_of_methods_names_every_one() -> None:
    page = (Path(__file__).parents[2] / "docs" / "methods.md").read_text()
    cells = " ".join(line.split("|")[1] for line in page.splitlines() if line.startswith("| `"))
    told = set(re.findall(r"`(.+?)`", cells))
    missing = {*arms(1), *beyond(1)} - told
    assert not missing, f"docs/methods.md: give a place in its table to {', '.join(sorted(missing))}"
    unknown = told - {*arms(1, 2), *beyond(1, 2)}
    assert not unknown, f"docs/methods.md: there is no {', '.join(sorted(unknown))}"


FIRST = replace(transfer(1), name="x", title="X", paper="a paper")


@pytest.mark.parametrize(
    "merge", [transfer(1), SCRATCH, FIRST, replace(MODE, name="odd", needs_fisher=False)]
)
@pytest.mark.parametrize(
    ("adaptation", "tuning"), [(Adaptation(), FineTuning()), (None, FineTuning(weight_pull=1e-2))]
)
def test_ratios_are_learned_over_uniform_merges_alone(
    merge: Merge, adaptation: Adaptation | None, tuning: FineTuning
) -> None:
    told = f"^a: expected a merge of all sources with equal ratios, .* \\(got {merge.name}\\)$"
    with pytest.raises(InputError, match=told):
        Arm("a", "A", "a paper", merge, adaptation, tuning)
    Arm("a", "A", "a paper", merge, Adaptation(ratios=False), FineTuning(l2_transfer=1.0))


def test_uniform_merges_are_those_of_all_sources() -> None:
    uniform = (MEAN, MODE, MODE_NORMALIZED, MEAN_ALIGNED, MODE_ALIGNED, replace(MODE, transfer_norms=True))
    assert all(merge.uniform for merge in uniform)
    assert [merge.source for merge in (SCRATCH, MEAN, MODE, transfer(1), transfer(3))] == [
        *(None, None, None),
        *(0, 2),
    ]
    assert not any(merge.uniform for merge in (SCRATCH, transfer(1), transfer(2)))


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
