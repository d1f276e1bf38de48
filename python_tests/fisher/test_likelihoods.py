import pytest
import torch

from timm_ext.errors import InputError
from timm_ext.fisher import Bernoulli, Categorical, Dice, Likelihood
from timm_ext.fisher.likelihoods import example_keys, get_likelihood, summed_logits

Z = torch.randn(3, 4, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
REGIONS = (torch.rand(3, 4, 5, 6, generator=torch.Generator().manual_seed(1)) < 0.4).double()
CLASSES = torch.randint(0, 4, (3, 5, 6), generator=torch.Generator().manual_seed(2))


def test_bernoulli_is_the_voxel_sum():
    p = Z.sigmoid()
    expected = (REGIONS * p.log() + (1 - REGIONS) * (1 - p).log()).sum((1, 2, 3))
    torch.testing.assert_close(Bernoulli().log_likelihood(Z, REGIONS), expected)


def test_categorical_is_the_voxel_sum():
    expected = Z.log_softmax(1).gather(1, CLASSES[:, None]).sum((1, 2, 3))
    torch.testing.assert_close(Categorical().log_likelihood(Z, CLASSES), expected)


def test_dice_by_hand():
    # p = 1/2 in four voxels. Two of them true: (2 * 1 + s) / (2 + 2 + s); none true: s / (2 + s).
    logits, target = torch.zeros(1, 2, 4, dtype=torch.float64), torch.zeros(1, 2, 4)
    target[0, 0, :2] = 1
    s = 1e-5
    expected = ((2 + s) / (4 + s) + s / (2 + s)) / 2
    assert Dice().log_likelihood(logits, target).exp().item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("likelihood", "target"), [(Bernoulli(), REGIONS), (Categorical(), CLASSES), (Dice(), REGIONS)]
)
def test_score_is_the_gradient(likelihood, target):
    z = Z.clone().requires_grad_()
    (expected,) = torch.autograd.grad(likelihood.log_likelihood(z, target).sum(), z)
    torch.testing.assert_close(likelihood.score(Z, target, list("abc")), expected)


@pytest.mark.parametrize("likelihood", [Bernoulli(), Categorical(), Dice()])
def test_the_score_of_a_drawn_label(likelihood):
    keys = example_keys("abc", seed=0, sample=0)
    score = likelihood.sampled_score(Z, keys, list("abc"))
    expected = likelihood.score(Z, likelihood.sample(Z, keys), list("abc"))
    torch.testing.assert_close(score, expected, rtol=1e-12, atol=1e-14)


def test_examples_are_keyed():
    def key(**change):
        return example_keys(**({"ids": ["a"], "seed": 1, "sample": 0} | change)).item()

    assert key() == key()
    keys = [key(), key(seed=2), key(ids=["b"]), key(sample=1), key(seed=10), key(seed=-1)]
    assert len(set(keys)) == len(keys)
    assert example_keys(["b", "a"], seed=1, sample=0)[1].item() == key()


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (CLASSES.float(), r"y: expected int64 classes .got torch\.float32"),
        (CLASSES + 1, "y: expected labels 0 to 3 .got 4 in example"),
        (CLASSES.masked_fill(CLASSES.eq(1), -1), "expected labels 0 to 3 .got -1 in example"),
        (CLASSES[:, :4], r"y: expected shape \[3, 5, 6\] .got \[3, 4, 6\]"),
    ],
)
def test_classes_are_checked(target, message):
    with pytest.raises(InputError, match=message):
        Categorical().check(Z, target, list("abc"))


def test_classes_may_come_as_maps_of_0_and_1():
    maps = torch.nn.functional.one_hot(CLASSES, Z.shape[1]).movedim(-1, 1).float()
    likelihood, ids = Categorical(), list("abc")
    likelihood.check(Z, maps, ids)
    torch.testing.assert_close(likelihood.log_likelihood(Z, maps), likelihood.log_likelihood(Z, CLASSES))
    torch.testing.assert_close(likelihood.score(Z, maps, ids), likelihood.score(Z, CLASSES, ids))
    maps[1, :, 0, 0] = 1
    with pytest.raises(InputError, match=r"of exactly one class in each voxel .got 4 in example b"):
        likelihood.check(Z, maps, ids)


def test_label_error_names_the_example():
    target = REGIONS.clone()
    target[2, 1, 0, 0] = 0.5
    with pytest.raises(InputError, match=r"got 0.5 in example third"):
        Bernoulli().check(Z, target, ["first", "second", "third"])


def test_dice_needs_regions():
    with pytest.raises(InputError, match=r"dice: expected logits \[B, R, ...\] .got \[3, 4\]"):
        Dice().score(Z[:, :, 0, 0], REGIONS[:, :, 0, 0], list("abc"))


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda z, y: z.sum(), r"one value for each example, \[3\] .got torch.float64 of shape \[\]"),
        (lambda z, y: torch.ones(3), "expected a differentiable function"),
        (lambda z, y: z.flatten(1).sum(1) / 0, "log-likelihood: expected finite values .* example a, b, c"),
        (lambda z, y: (z * 0).flatten(1).sum(1).sqrt(), "gradient of the log-likelihood: expected finite"),
    ],
)
def test_functions_are_checked(function, message):
    with pytest.raises(InputError, match=message):
        get_likelihood(function).score(Z, None, list("abc"))


def test_own_likelihood_without_sample():
    class Gauss(Likelihood):
        def log_likelihood(self, logits, target):
            return -((logits - target) ** 2).flatten(1).sum(1) / 2

    likelihood = get_likelihood(Gauss())
    torch.testing.assert_close(likelihood.score(Z, REGIONS, list("abc")), REGIONS - Z)
    with pytest.raises(InputError, match=r"expected one with a sample method .* .got Gauss"):
        likelihood.sample(Z, torch.zeros(3, dtype=torch.int64))


def test_logits_of_several_maps():
    low = torch.tensor([[[1.0, 2.0]]])
    high = torch.zeros(1, 1, 4)
    expected = [1.0, 1.0, 2.0, 2.0]
    assert summed_logits([high, low])[0, 0].tolist() == expected
    assert summed_logits((low, high))[0, 0].tolist() == expected
    assert summed_logits({"a": low, "b": high})[0, 0].tolist() == expected
    assert summed_logits([low]) is low


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ([], "expected logits or a list of them .got list of nothing"),
        (torch.ones(2, 2, dtype=torch.int64), r"got torch\.int64 of shape \[2, 2\]"),
        (None, "got NoneType"),
        (
            [torch.ones(1, 1, 4), torch.ones(1, 1, 3)],
            r"sizes divide those of the largest, \[1, 1, 4\] .got \[1, 1, 3\]",
        ),
        ([torch.ones(1, 1, 4), torch.ones(1, 2, 2)], "maps of one channel count"),
    ],
)
def test_outputs_are_checked(output, message):
    with pytest.raises(InputError, match=message):
        summed_logits(output)
