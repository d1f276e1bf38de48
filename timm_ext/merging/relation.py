"""Whether networks come from one initialisation: channels of others are in no common order."""

from collections.abc import Sequence

import torch
from torch import nn

from timm_ext.parameters import matches, named_parameters

_SURE = 5.0  # standard deviations


def of_one_initialisation(model: nn.Module, reference: nn.Module, ignore: Sequence[str] = ()) -> bool:
    """Tell whether two networks were trained from one initialisation, however far.

    See `relation`; networks whose channels were aligned count, too.
    """
    return relation(model, reference, ignore) > _SURE


def relation(model: nn.Module, reference: nn.Module, ignore: Sequence[str] = ()) -> float:
    """Return by how many standard deviations filters of one number are more alike than others.

        z = Σ_l Σ_i √n_l (s_lii − m_l) / (σ √N)

    with s_lij the cosine of filter i of the network and filter j of the reference in layer l, n_l the
    elements of a filter, m_l the mean over i ≠ j, σ the standard deviation of √n_l s_lij about it over all
    layers, and N filters in all. Hidden channels have no order of their own, so that z is about standard
    normal unless the networks have one from where they come.

    Args:
        model: a network.
        reference: another one.
        ignore: shell patterns of parameters that are not compared, such as heads.
    """
    others = named_parameters(reference)
    gain, squares, filters, pairs = 0.0, 0.0, 0, 0
    for name, parameter in named_parameters(model).items():
        other, count = others.get(name), len(parameter) if parameter.ndim > 1 else 0
        if count < 2 or other is None or other.shape != parameter.shape or matches(name, ignore):
            continue
        one, two = (p.detach().cpu().double().flatten(1) for p in (parameter, other))
        cosines = nn.functional.normalize(one) @ nn.functional.normalize(two).T * one.shape[1] ** 0.5
        apart = cosines[~torch.eye(count, dtype=torch.bool)]
        gain += float((cosines.diag() - apart.mean()).sum())
        squares += float((apart - apart.mean()).square().sum())
        filters, pairs = filters + count, pairs + len(apart)
    return gain / (filters * squares / pairs) ** 0.5 if squares else 0.0
