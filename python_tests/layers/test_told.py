"""What `timm-ext info` says of the layers that compute."""

import pytest

from timm_ext.layers import half, told
from timm_ext.layers.told import paths_told

BUILD = {"isa_chosen": "avx2", "gpu": "none: torch finds no GPU or no driver"}


def test_a_cpu_says_why_it_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TIMM_EXT_ISA", raising=False)
    found = paths_told(BUILD, gpu=False)
    assert found["layers, float32 on a CPU"].startswith("timm_ext.fast_layers by avx2: the best that")
    assert "train.fast_layers=false" in found["layers, float32 on a CPU"]
    assert found["layers, GPU"] == "not used: torch finds no GPU or no driver"
    assert "no GPU" in found["trainings"]


def test_an_instruction_set_that_was_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIMM_EXT_ISA", "avx2")
    assert "by avx2: TIMM_EXT_ISA says so" in paths_told(BUILD, gpu=False)["layers, float32 on a CPU"]


def test_a_gpu_is_left_to_pytorch() -> None:
    found = paths_told(BUILD, gpu=True)
    assert found["layers, GPU"].startswith("PyTorch's")
    assert found["trainings"].startswith("on the GPU")


@pytest.mark.parametrize(
    ("path", "words"),
    [("amx", "AMX"), ("avx512_bf16", "stored in bfloat16, computed in float32"), ("float32", "float32")],
)
def test_bfloat16_is_told_with_its_reason(monkeypatch: pytest.MonkeyPatch, path: str, words: str) -> None:
    monkeypatch.setattr(told, "half_path", lambda: (path, "a reason"))
    line = paths_told(BUILD, gpu=False)["layers, bf16-mixed on a CPU"]
    assert words in line
    assert line.endswith(": a reason")
    assert half.half_path()[0] in ("amx", "avx512_bf16", "float32")
