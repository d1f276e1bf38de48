"""Sampled labels and scores against the definition, the laws of their random numbers, and the messages."""

import pytest
import torch

import timm_ext
from timm_ext.ops import reference

LIKELIHOODS = ["bernoulli", "categorical"]
KEYS = torch.tensor([0, 5, -7, 2**63 - 1])


def draw_logits(*shape: int, scale: float = 3.0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (scale * torch.randn(shape, generator=torch.Generator().manual_seed(0))).to(dtype)


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(4, 1, 1), (4, 3, 63), (4, 4, 5, 13), (4, 2, 17, 10, 100), (4, 7)])
def test_are_those_of_the_reference(
    likelihood: str, dtype: torch.dtype, shape: tuple[int, ...], device: torch.device
) -> None:
    logits = draw_logits(*shape, dtype=dtype).to(device)
    labels, score = timm_ext.sample_labels(logits, KEYS.to(device), likelihood)
    expected_labels, expected = reference.sample_labels(logits.double(), KEYS.to(device), likelihood)
    assert score.dtype == dtype
    assert torch.equal(labels, expected_labels)  # none of these draws lies within rounding of its threshold
    error = float((score - expected).abs().max())
    assert error <= (4e-7 if dtype == torch.float32 else 1e-14)


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_scores_without_labels(likelihood: str) -> None:
    logits = draw_logits(4, 3, 100)
    labels, score = timm_ext.sample_labels(logits, KEYS, likelihood, labels=False)
    assert labels.shape == (0,)
    assert torch.equal(score, timm_ext.sample_labels(logits, KEYS, likelihood)[1])


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_an_example_is_drawn_alike_in_any_batch(likelihood: str) -> None:
    logits = draw_logits(4, 3, 20, 30)
    whole = timm_ext.sample_labels(logits, KEYS, likelihood)
    order = torch.tensor([2, 0])
    for one, all_of_them in zip(
        timm_ext.sample_labels(logits[order], KEYS[order], likelihood), whole, strict=True
    ):
        assert torch.equal(one, all_of_them[order])


def test_frequencies_are_the_probabilities() -> None:
    count = 200_000
    logits = torch.tensor([0.5, -1.0, 0.1])[None, :, None].expand(1, 3, count)
    classes, _ = timm_ext.sample_labels(logits, KEYS[1:2], "categorical")
    shares = torch.bincount(classes[0], minlength=3) / count
    torch.testing.assert_close(shares, logits[0, :, 0].softmax(0), rtol=0, atol=0.004)  # 3.6 deviations
    regions, _ = timm_ext.sample_labels(logits, KEYS[1:2], "bernoulli")
    torch.testing.assert_close(
        regions[0].double().mean(1), logits[0, :, 0].double().sigmoid(), rtol=0, atol=0.004
    )


def test_numbers_are_uniform_and_independent() -> None:
    numbers = reference.uniform(KEYS, 1_000_000)
    assert numbers.min() >= 0
    assert numbers.max() < 1
    for row in numbers.double():
        counts = torch.histc(row, bins=100, min=0, max=1)
        chi_squared = float(((counts - 10_000) ** 2 / 10_000).sum())
        assert 50 < chi_squared < 170  # 99 degrees of freedom
    correlations = torch.corrcoef(numbers.double())
    assert float((correlations - torch.eye(len(KEYS))).abs().max()) < 0.005
    for shift in (1, 16, 64):  # neighbours in a vector, in a block, and from group to group
        pair = torch.stack([numbers[0, shift:], numbers[0, :-shift]]).double()
        assert abs(float(torch.corrcoef(pair)[0, 1])) < 0.005


def test_at_the_ends() -> None:
    logits = torch.tensor([[-1e4, 1e4, -1e4]])[:, :, None].expand(1, 3, 100)
    for dtype in (torch.float32, torch.float64):
        classes, score = timm_ext.sample_labels(logits.to(dtype), KEYS[:1], "categorical")
        assert bool((classes == 1).all())
        assert not score.any()
        regions, score = timm_ext.sample_labels(logits.to(dtype), KEYS[:1], "bernoulli")
        assert torch.equal(regions, (logits > 0).long())
        assert not score.any()
    infinite = torch.tensor([[-torch.inf, 0.0, -torch.inf]])[:, :, None].expand(1, 3, 100)
    assert bool((timm_ext.sample_labels(infinite, KEYS[:1], "categorical")[0] == 1).all())
    _, score = timm_ext.sample_labels(torch.full((1, 1, 5), torch.nan), KEYS[:1], "bernoulli")
    assert bool(score.isnan().all())


def test_rare_labels_keep_their_precision() -> None:
    logits = torch.full((1, 1, 1000), 20.0)
    _, score = timm_ext.sample_labels(logits, KEYS[:1], "bernoulli")
    exact = torch.sigmoid(torch.tensor(-20.0, dtype=torch.float64))
    torch.testing.assert_close(score.double(), exact.expand(1, 1, 1000), rtol=1e-6, atol=0)


def test_strided_logits() -> None:
    logits = draw_logits(4, 6, 8, 9)
    last = logits.to(memory_format=torch.channels_last)
    for likelihood in LIKELIHOODS:
        for one, other in zip(
            timm_ext.sample_labels(last, KEYS, likelihood),
            timm_ext.sample_labels(logits, KEYS, likelihood),
            strict=True,
        ):
            assert torch.equal(one, other)


def test_a_graph_ends_here() -> None:
    _, score = timm_ext.sample_labels(draw_logits(4, 3, 5).requires_grad_(), KEYS, "bernoulli")
    assert not score.requires_grad


@pytest.mark.parametrize("shape", [(0, 3, 5), (4, 3, 0)])
def test_nothing_to_draw(shape: tuple[int, ...]) -> None:
    labels, score = timm_ext.sample_labels(torch.zeros(shape), KEYS[: shape[0]], "categorical")
    assert labels.shape == (shape[0], shape[2])
    assert score.shape == shape


@pytest.mark.parametrize(
    ("logits", "keys", "likelihood", "message"),
    [
        (torch.zeros(4), KEYS, "bernoulli", r"logits must be \[B, K, ...\] with K >= 1 .got \[4\]"),
        (torch.zeros(4, 0, 2), KEYS, "bernoulli", r"with K >= 1 .got \[4, 0, 2\]"),
        (torch.zeros(4, 2).half(), KEYS, "bernoulli", "must be float32 or float64 .got float16"),
        (torch.zeros(4, 2), KEYS[:3], "bernoulli", r"keys must be \[B\] = \[4\] .got \[3\]"),
        (torch.zeros(4, 2), KEYS.double(), "bernoulli", "keys must be int64 .got float64"),
        (torch.zeros(4, 2), KEYS, "dice", "likelihood must be 'bernoulli' or 'categorical' .got 'dice'"),
    ],
)
def test_refuses(logits: torch.Tensor, keys: torch.Tensor, likelihood: str, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        timm_ext.sample_labels(logits, keys, likelihood)
