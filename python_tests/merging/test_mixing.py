import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from timm_ext.errors import InputError
from timm_ext.layout import Layout
from timm_ext.merging.bank import Bank
from timm_ext.merging.merged_model import MergedModel
from timm_ext.merging.mixing import anchored_logits, logits_of, merge_matrices, ratios_of, squared_departure


def matrices(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Three models of ten elements in four segments of three groups; one segment holds one element."""
    generator = torch.Generator().manual_seed(1)
    theta = torch.randn(3, 10, generator=generator, dtype=torch.float64).to(dtype)
    weights = torch.randn(3, 3, generator=generator, dtype=torch.float64)
    return theta, weights, torch.tensor([0, 4, 5, 8, 10]), torch.tensor([0, 2, 1, 0])


def free(theta: Tensor, weights: Tensor, offsets: Tensor, groups: Tensor | None) -> Tensor:
    return merge_matrices(theta, None, weights, offsets, mixing="free", groups=groups)


def test_free_weights_are_a_weighted_sum() -> None:
    theta, weights, offsets, groups = matrices()
    rows = [0, 0, 0, 0, 2, 1, 1, 1, 0, 0]
    expected = (weights[rows] * theta.T).sum(1)
    torch.testing.assert_close(free(theta, weights, offsets, groups), expected)
    torch.testing.assert_close(free(theta, weights[groups], offsets, None), expected)


def test_gradient_of_free_weights(device: torch.device) -> None:
    theta, weights, offsets, groups = (tensor.to(device) for tensor in matrices())
    weights.requires_grad_()
    assert torch.autograd.gradcheck(lambda w: free(theta, w, offsets, groups), (weights,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_free_weights_are_applied_in_float32(dtype: torch.dtype) -> None:
    theta, weights, offsets, groups = matrices(dtype)
    merged = free(theta, weights.float(), offsets, groups)
    assert merged.dtype == dtype
    exact = free(theta.double(), weights, offsets, groups)
    torch.testing.assert_close(merged.double(), exact, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


def test_long_segments_lose_nothing_in_the_gradient() -> None:
    generator = torch.Generator().manual_seed(0)
    theta = torch.rand(1, 1_000_000, generator=generator)
    weights = torch.ones(1, 1, requires_grad=True)
    free(theta, weights, torch.tensor([0, 1_000_000]), None).sum().backward()
    assert weights.grad.item() == pytest.approx(theta.double().sum().item(), rel=1e-7)


def test_ratios_of_free_weights_are_the_weights() -> None:
    weights = torch.tensor([[-1.0, 3.0]])
    assert ratios_of(weights, "free").tolist() == [[-1, 3]]


@given(
    ratios=st.lists(st.floats(1e-4, 1), min_size=1, max_size=5),
    mixing=st.sampled_from(["sigmoid", "softmax", "ratios", "free"]),
)
def test_logits_of_ratios_give_those_ratios(ratios: list[float], mixing: str) -> None:
    wanted = torch.tensor(ratios) / sum(ratios)
    net = nn.Linear(2, 1)
    models = {str(t): net.state_dict() for t in range(len(ratios))}
    bank = Bank.build(models, None, Layout.from_model(net, ["weight"]))
    model = MergedModel(net, bank, mixing=mixing, initial_logits=logits_of(wanted, mixing))
    torch.testing.assert_close(model.ratios()[0], wanted, rtol=1e-5, atol=1e-7)


def test_equal_ratios_have_logits_of_zero() -> None:
    assert logits_of(torch.full((4,), 0.25)).tolist() == [0, 0, 0, 0]


def test_ratio_of_zero_has_no_logit() -> None:
    with pytest.raises(InputError, match=r"ratios: expected all above 0 \(got \[0.0, 1.0\]\)"):
        logits_of(torch.tensor([0.0, 1.0]))


def test_anchored_logits() -> None:
    assert anchored_logits(1.5, 3).tolist() == [1.5, -1.5, -1.5]
    assert anchored_logits(-1.5, 2, "softmax").tolist() == [-1.5, 1.5]
    assert anchored_logits(0.0, 2, "free").tolist() == [0.5, 0.5]
    with pytest.raises(InputError, match=r"anchor: expected a finite number \(got inf\)"):
        anchored_logits(float("inf"), 2)


@pytest.mark.parametrize(
    ("mixing", "departure"),
    [
        ("sigmoid", 3**2 + 1**2),
        ("softmax", 1**2 + 1**2),  # 3 and 1 less their mean
        ("ratios", 0.25**2 + 0.25**2),  # 3/4 and 1/4 less 1/2
        ("free", 2.5**2 + 0.5**2),  # 3 and 1 less 1/2
    ],
)
def test_departure_from_equal_ratios_by_hand(mixing: str, departure: float) -> None:
    """The second group's ratios are equal, so that it adds nothing."""
    equal = {"sigmoid": 0.0, "softmax": 7.0, "ratios": 2.0, "free": 0.5}[mixing]
    logits = torch.tensor([[3.0, 1.0], [equal, equal]], requires_grad=True)
    value = squared_departure(logits, mixing)
    assert value.item() == pytest.approx(departure)
    value.backward()
    assert logits.grad is not None
    assert logits.grad[1].abs().max() < 1e-6
    assert logits.grad[0, 0] > 0
