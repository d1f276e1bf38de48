"""The definitions themselves, against sums written out in plain Python."""

import math

import pytest
import torch

from timm_ext.ops import reference


def merge_by_hand(
    theta: list[list[float]], fisher: list[list[float]] | None, ratios: list[list[float]], rows: list[int]
) -> list[float]:
    """One element after the other; `rows` names the row of ratios of each element."""
    merged = []
    for p, row in enumerate(rows):
        weights = [ratios[row][t] * (1.0 if fisher is None else fisher[t][p]) for t in range(len(theta))]
        if sum(weights) == 0:
            weights = ratios[row]
        merged.append(sum(w * theta[t][p] for t, w in enumerate(weights)) / sum(weights))
    return merged


@pytest.mark.parametrize(
    ("mixing", "ratio"),
    [("sigmoid", lambda x: 1 / (1 + math.exp(-x))), ("softmax", math.exp), ("ratios", lambda x: x)],
)
@pytest.mark.parametrize("weighted", [True, False])
def test_fused_merge_is_the_weighted_mean(mixing: str, ratio: object, weighted: bool) -> None:
    theta = torch.randn(3, 6, dtype=torch.float64)
    fisher = torch.rand(3, 6, dtype=torch.float64)
    fisher[:, 4] = 0
    logits = torch.rand(2, 3, dtype=torch.float64) + 0.1
    got = reference.fused_merge(
        theta,
        fisher if weighted else None,
        logits,
        torch.tensor([0, 1, 3, 6]),
        mixing=mixing,
        groups=torch.tensor([1, 0, 1]),
    )
    ratios = [[ratio(float(x)) for x in row] for row in logits]  # type: ignore[operator]
    expected = merge_by_hand(
        theta.tolist(), fisher.tolist() if weighted else None, ratios, [1, 0, 0, 1, 1, 1]
    )
    assert got.tolist() == pytest.approx(expected, rel=1e-12)


def test_out_is_filled() -> None:
    out = torch.empty(2)
    theta = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert reference.fused_merge(theta, None, torch.zeros(1, 2), torch.tensor([0, 2]), out=out) is out
    assert out.tolist() == [2.0, 3.0]


def test_square_accumulate() -> None:
    acc = [torch.tensor([1.0]), torch.tensor([2.0])]
    reference.square_accumulate_(acc, [torch.tensor([2.0]), torch.tensor([3.0])], 0.5)
    assert [a.item() for a in acc] == [3.0, 6.5]


def test_unknown_mixing() -> None:
    with pytest.raises(ValueError, match="mixing: expected 'sigmoid', 'softmax' or 'ratios'"):
        reference.log_weights(torch.zeros(1, 2), "mean")
