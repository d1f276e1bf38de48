import pytest

from timm_ext.errors import InputError
from timm_ext.study.arms import Combination, JointTransfer, get_row, rows
from timm_ext.transfer.arms import Arm, arms, beyond


def test_rows_are_the_arms_and_what_only_a_study_makes() -> None:
    table = rows(1, 2)
    assert {name for name, row in table.items() if isinstance(row, Arm)} == {*arms(1, 2)}
    assert {name for name, row in table.items() if not isinstance(row, Arm)} == {*beyond(1, 2)}
    assert all(get_row(name) == row and row.name == name for name, row in table.items())


def test_what_a_row_is_made_of() -> None:
    table = rows(2)
    soup, ensemble, joint, own = (table[n] for n in ("soup", "ensemble", "transfer-joint", "transfer-2-all"))
    assert isinstance(soup, Combination)
    assert isinstance(ensemble, Combination)
    assert (soup.mean_of, ensemble.mean_of, soup.models) == ("weights", "logits", 2)
    assert isinstance(joint, JointTransfer)
    assert isinstance(own, JointTransfer)
    assert (joint.number, joint.models, own.number, own.models) == (None, 1, 2, 2)
    assert own.title == "Transfer from M2, all source cases"
    assert own.arm.merge == joint.arm.merge == arms(1)["transfer-1"].merge


def test_an_unknown_row_lists_the_known_ones() -> None:
    with pytest.raises(
        InputError, match=r"expected one of scratch, .*t-imm, .*soup, .* \(got 'transfer-0-all'"
    ):
        get_row("transfer-0-all")
