import pytest
import torch

from timm_ext.fisher.precision import autocast, precise, tolerance


@pytest.mark.parametrize("precision", ["ieee", "tf32", "bf16-mixed"])
def test_cuda_products_are_set_and_restored(precision):
    backends = [torch.backends.cudnn.conv, torch.backends.cuda.matmul]
    before = [backend.fp32_precision for backend in backends]
    with precise(precision, torch.device("cuda")):
        expected = "tf32" if precision == "tf32" else "ieee"
        assert [backend.fp32_precision for backend in backends] == [expected, expected]
    assert [backend.fp32_precision for backend in backends] == before


@pytest.mark.parametrize(
    ("precision", "dtype"), [("bf16-mixed", torch.bfloat16), ("16-mixed", torch.float16)]
)
def test_mixed_precision_is_autocast(precision, dtype):
    with autocast(precision, torch.device("cpu")):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype
    with autocast("ieee", torch.device("cpu")):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32


def test_tolerance_grows_with_rounding():
    assert (
        tolerance("ieee", torch.float64) < tolerance("ieee", torch.float32) < tolerance("tf32", torch.float32)
    )
    assert tolerance("tf32", torch.float32) < tolerance("bf16-mixed", torch.float32) < 0.1
