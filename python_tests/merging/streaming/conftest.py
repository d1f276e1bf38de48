import pytest
from streaming_samples import save, weights

from timm_ext.merging.streaming import blocks


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks and chunks so small that tensors are cut at many places."""
    monkeypatch.setattr(blocks, "BLOCK", 4096)
    monkeypatch.setattr(blocks, "CHUNK", 1024)


@pytest.fixture
def pair(tmp_path):
    """Two checkpoints that fit, in files."""
    return [save(tmp_path / f"m{t}.safetensors", weights(t)) for t in range(2)]
