"""Diagonal Fisher information of a network's parameters, exact per example at any batch size."""

from timm_ext.fisher.accumulator import FisherAccumulator
from timm_ext.fisher.estimate import estimate_fisher
from timm_ext.fisher.likelihoods import Bernoulli, Categorical, Dice, Likelihood
from timm_ext.fisher.partial import remove_partial
from timm_ext.fisher.result import Fisher, FisherKind

__all__ = [
    "Bernoulli",
    "Categorical",
    "Dice",
    "Fisher",
    "FisherAccumulator",
    "FisherKind",
    "Likelihood",
    "estimate_fisher",
    "remove_partial",
]
