"""What a few cases tell of starts, and what they cannot."""

import pytest

from timm_ext.transfer.advice import Candidate, verdict


def candidate(name, *dice):
    return Candidate(name, -0.1, dice, 1.0)


@pytest.mark.parametrize(
    ("one", "other", "told"),
    [
        ([0.5], [0.1], "one case cannot tell A from B by Dice"),
        ([0.0, 0.0], [0.0, 0.0], "the fitted heads of A and of B find no region: Dice 0 in 2 cases"),
        ([0.5, 0.5], [0.1, 0.1], "too few cases to tell A from B: Dice +0.400 ± 0.000 over 2 cases"),
        ([0.5, 0.4, 0.6], [0.1, 0.1, 0.1], "A leads B: Dice +0.400 ± 0.058 over 3 cases"),
        ([0.1, 0.1, 0.1], [0.5, 0.4, 0.6], "B leads A: Dice +0.400 ± 0.058 over 3 cases"),
        (
            [0.5, 0.1, 0.4],
            [0.1, 0.4, 0.4],
            "too few cases to tell A from B: Dice +0.033 ± 0.203 over 3 cases",
        ),
    ],
)
def test_a_difference_is_told_where_it_exceeds_its_error(one, other, told):
    assert verdict(candidate("A", *one), candidate("B", *other)) == told
