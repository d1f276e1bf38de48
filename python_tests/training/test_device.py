"""Memory of a training process."""

import subprocess
import sys

import pytest
import torch

from timm_ext.errors import InputError
from timm_ext.training.device import launch
from timm_ext.training.settings import TrainSettings

PROBE = """
import sys
from pathlib import Path
import torch
from timm_ext.training.device import keep_freed_memory

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 // 2**20

if sys.argv[1] == "keep" and not keep_freed_memory():
    print("unknown")
    raise SystemExit
before = resident()
for _ in range(3):
    block = torch.ones(2**26 // 4)
    del block
print(resident() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("mode", "kept"), [("keep", True), ("leave", False)])
def test_freed_memory_stays_with_the_process(mode: str, kept: bool) -> None:
    done = subprocess.run([sys.executable, "-c", PROBE, mode], capture_output=True, text=True, check=True)
    if done.stdout.strip() == "unknown":
        pytest.skip("malloc has no mallopt")
    assert (int(done.stdout) >= 60) == kept


@pytest.mark.parametrize("accelerator", ["cpu", "auto"])
def test_float16_on_a_cpu_is_refused(accelerator, monkeypatch):
    """Lightning Fabric takes bfloat16 in its place, with no more than a warning."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    settings = TrainSettings(accelerator=accelerator, precision="16-mixed")
    with pytest.raises(InputError, match=r"expected a GPU for precision 16-mixed \(got a CPU: use 32-true"):
        launch(settings)


def test_bfloat16_on_a_cpu_that_is_slow_in_it_is_float32(monkeypatch):
    monkeypatch.setattr(
        "timm_ext.training.device.half_path", lambda: ("float32", "the CPU has neither AMX nor AVX512-BF16")
    )
    with pytest.warns(UserWarning, match="bf16-mixed is computed in float32 here: the CPU has neither"):
        fabric = launch(TrainSettings(accelerator="cpu", precision="bf16-mixed"))
    with fabric.autocast():
        assert not torch.is_autocast_enabled("cpu")
