"""Logistic regression: closed forms, the slope at the mode, and the evidence as an integral."""

import math

import pytest
import torch
from torch.nn import functional

from timm_ext.transfer.head import regression
from timm_ext.transfer.head.regression import Labelled, fit

ONES = torch.ones(200, 1)


def drawn(outputs=1, *, softmax=False, columns=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(200, columns, generator=generator)
    logits = features @ torch.randn(columns, outputs, generator=generator) - 0.5
    if softmax:
        classes = torch.distributions.Categorical(logits=logits).probs.cumsum(1)
        chosen = (torch.rand(200, 1, generator=generator) > classes).sum(1).clamp(max=outputs - 1)
        targets = functional.one_hot(chosen, outputs).float()
    else:
        targets = (torch.rand(200, outputs, generator=generator) < logits.sigmoid()).float()
    return features, targets


@pytest.mark.parametrize("rounds", [1, 20])
@pytest.mark.parametrize("softmax", [False, True])
def test_the_slope_is_zero_at_the_penalties_that_are_told(softmax, rounds, monkeypatch):
    """Also where λ has not settled yet when its rounds are over."""
    monkeypatch.setattr(regression, "_ROUNDS", rounds)
    features, targets = drawn(3, softmax=softmax)
    features = torch.cat([features * torch.tensor([1.0, 10.0, 0.1]) + 4, ONES], 1).double()
    counts = torch.arange(1.0, 201).double()
    found = fit(Labelled(features, targets, counts, softmax))
    share = counts / counts.sum()
    deviation = (share @ (features - share @ features).square()).sqrt()
    weights = found.weights.clone().requires_grad_(True)
    logits = features @ weights
    if softmax:
        loss = -(counts[:, None] * targets * logits.log_softmax(1)).sum()
    else:
        pairs = functional.binary_cross_entropy_with_logits(logits, targets.double(), reduction="none")
        loss = (counts[:, None] * pairs).sum()
    penalties = torch.tensor(found.penalties)
    (loss + 0.5 * (penalties * (deviation[:, None] * weights).square()).sum()).backward()
    assert (weights.grad / counts.sum()).abs().max() < 1e-6


@pytest.mark.parametrize("softmax", [False, True])
def test_the_examples_part_of_the_hessian_is_made_once_at_each_point(softmax, monkeypatch):
    points, whole = [], regression._Problem._curvature

    def counted(problem, probabilities):
        points.append(probabilities)
        return whole(problem, probabilities)

    monkeypatch.setattr(regression._Problem, "_curvature", counted)
    features, targets = drawn(2 if softmax else 1, softmax=softmax)
    fit(Labelled(torch.cat([features, ONES], 1), targets, torch.ones(200), softmax))
    assert len(points) > 5
    assert not any(a.shape == b.shape and torch.equal(a, b) for n, a in enumerate(points) for b in points[:n])


def test_constant_columns_give_the_share():
    targets = torch.zeros(200, 1)
    targets[:50] = 1
    found = fit(Labelled(torch.cat([0 * ONES, 2 * ONES, 3 * ONES], 1), targets, torch.ones(200)))
    assert found.weights[:, 0].tolist() == pytest.approx([0, math.log(50 / 150) / 2, 0])


def test_an_example_that_counts_is_as_many():
    features, targets = drawn()
    counts = torch.randint(1, 4, (200,), generator=torch.Generator().manual_seed(1))
    once = fit(Labelled(features, targets, counts.float()))
    often = fit(Labelled(*(v.repeat_interleave(counts, 0) for v in (features, targets, torch.ones(200)))))
    assert torch.allclose(once.weights, often.weights, rtol=1e-5)
    assert once.evidence == pytest.approx(often.evidence)


def test_separable_classes_have_finite_weights():
    features = torch.linspace(-1, 1, 200)[:, None]
    found = fit(Labelled(torch.cat([features, ONES], 1), (features > 0).float(), torch.ones(200)))
    assert found.weights.isfinite().all()
    assert found.weights[0, 0] > 10
    assert -0.1 < found.evidence < 0


def test_evidence_is_the_integral():
    """Of one weight without an intercept, at the λ that was found."""
    features, targets = drawn(columns=1)
    features = features / features.square().mean().sqrt()
    found = fit(Labelled(features, targets, torch.ones(200)))
    size, (penalty,) = features.double().std(correction=0), found.penalties
    w = torch.linspace(-8, 8, 40001, dtype=torch.float64)
    logits = features.double() / size * w
    joint = (targets * functional.logsigmoid(logits) + (1 - targets) * functional.logsigmoid(-logits)).sum(0)
    prior = 0.5 * math.log(penalty / (2 * math.pi)) - 0.5 * penalty * w.square()
    integral = torch.logsumexp(joint + prior, 0) + math.log(16 / 40000)
    assert found.evidence * 200 == pytest.approx(float(integral), abs=0.02)


def test_two_classes_are_one_region():
    features, targets = drawn()
    features = torch.cat([features, ONES], 1)
    region = fit(Labelled(features, targets, torch.ones(200)))
    classes = fit(Labelled(features, torch.cat([1 - targets, targets], 1), torch.ones(200), softmax=True))
    assert classes.penalties[0] == pytest.approx(2 * region.penalties[0], rel=0.05)
    assert classes.evidence == pytest.approx(region.evidence, rel=1e-3)
    difference = classes.weights[:, 1:] - classes.weights[:, :1]
    assert torch.allclose(difference, region.weights, rtol=1e-2, atol=1e-2)


def test_columns_of_noise_are_held_small():
    """Their λ is larger, and the evidence no higher than that of the constant alone."""
    noise = torch.randn(200, 20, generator=torch.Generator().manual_seed(3))
    _, targets = drawn()
    plain = fit(Labelled(ONES, targets, torch.ones(200)))
    noisy = fit(Labelled(torch.cat([noise, ONES], 1), targets, torch.ones(200)))
    useful = fit(Labelled(torch.cat([drawn()[0], ONES], 1), targets, torch.ones(200)))
    assert noisy.evidence < plain.evidence + 0.01 < useful.evidence
    assert noisy.penalties[0] > useful.penalties[0]
