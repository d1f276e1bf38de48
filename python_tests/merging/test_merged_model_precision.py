import copy

import pytest
import torch
from merged_model_samples import FisherStub, bank_of, image, network, plain_merge

from timm_ext.merging.bank import Bank
from timm_ext.merging.merged_model import MergedModel


def test_the_bank_moves_with_its_padding_and_its_dtype() -> None:
    bank = bank_of()
    bank.fisher[0, 0] = 1e30  # beyond float16
    model = MergedModel(network(9), bank)
    before = model.merge().detach()
    assert torch.equal(model.double().merge(), before.double())
    assert model.eval()(image().double()).dtype == torch.float64
    assert torch.equal(model.half().merge(), before.half())
    assert model._matrices.dtype == torch.float32
    meta = copy.deepcopy(model).to("meta")
    assert (meta._matrices.shape, meta._matrices.dtype) == (model._matrices.shape, torch.float32)
    assert meta._matrices.is_meta
    assert not model._matrices.is_meta


def narrow_bank(dtype: torch.dtype) -> Bank:
    """The models of `bank_of` with Fishers far beyond the range of float16."""
    bank = bank_of(3)
    models = {name: bank.layout.split(row) for name, row in zip(bank.sources, bank.theta, strict=True)}
    fishers = [FisherStub(bank.layout.split(row * 1e-20)) for row in bank.fisher]
    return Bank.build(models, fishers, bank.layout, dtype=dtype)


@pytest.mark.parametrize("size", [1e-12, 1.0, 1e12])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_bank_in_half_precision_trains_a_network_in_float32(dtype: torch.dtype, size: float) -> None:
    """Gradients of any size are those of the bank's values, within the rounding of merge and gradient."""
    bank, unit = narrow_bank(dtype), torch.finfo(dtype).eps / 2
    model = MergedModel(network(9), bank).eval()
    with torch.no_grad():
        model.logits.normal_(generator=torch.Generator().manual_seed(1))
    merged = model.merge()
    logits = model.logits.detach().double().requires_grad_()
    expected = plain_merge(model, bank, logits)
    assert merged.dtype == torch.float32
    torch.testing.assert_close(merged.double(), expected, rtol=1.01 * unit, atol=1e-7)

    gradient = size * torch.randn(merged.shape, generator=torch.Generator().manual_seed(2))
    (got,) = torch.autograd.grad(merged, model.logits, gradient)
    (wanted,) = torch.autograd.grad(expected, logits, gradient.double())
    assert float((got - wanted).norm() / wanted.norm()) < 2 * unit

    (model(image()).square().mean() * size).backward()
    assert bool(model.logits.grad.isfinite().all())
    assert model.logits.grad.abs().sum() > 0
    assert model.network.head.weight.grad.dtype == torch.float32


def test_gradients_of_a_float16_bank_add_up_over_batches() -> None:
    model = MergedModel(network(9), narrow_bank(torch.float16)).eval()
    losses = [model(image()).square().mean() * size for size in (1.0, 1e-9)]
    alone = [torch.autograd.grad(loss, model.logits, retain_graph=True)[0] for loss in losses]
    for loss in reversed(losses):
        loss.backward()
    torch.testing.assert_close(model.logits.grad, alone[0] + alone[1])
    torch.testing.assert_close(alone[1] * 1e9, alone[0], rtol=1e-3, atol=0)


def test_gradient_of_zeros_through_a_float16_bank() -> None:
    model = MergedModel(network(9), narrow_bank(torch.float16))
    (model(image()) * 0).sum().backward()
    assert not model.logits.grad.any()
