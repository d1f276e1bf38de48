import pytest
import torch

from timm_ext.layers.half import half_path


@pytest.fixture(autouse=True)
def forget():
    half_path.cache_clear()
    yield
    half_path.cache_clear()


@pytest.mark.parametrize(
    ("bf16", "amx", "path", "reason"),
    [
        (True, True, "amx", "has AMX"),
        (True, False, "avx512_bf16", "no AMX"),
        (False, False, "float32", "neither AMX nor AVX512-BF16"),
    ],
)
def test_path_follows_the_cpu(monkeypatch, bf16, amx, path, reason):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    assert half_path()[0] == path
    assert reason in half_path()[1]


def test_amx_is_taken_by_onednn_alone(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert half_path()[0] == "avx512_bf16"
