import torch

from timm_ext.training.weights import frozen_digest


def test_frozen_digest_is_of_what_is_not_saved():
    model = torch.nn.BatchNorm1d(2)
    model.register_buffer("bank", torch.zeros(3, dtype=torch.bfloat16), persistent=False)
    first = frozen_digest(model)
    model.running_mean += 1
    model.weight.data += 1
    assert frozen_digest(model) == first
    model.bank += 1
    changed = frozen_digest(model)
    assert changed != first
    model.weight.requires_grad_(False)
    assert frozen_digest(model) != changed
