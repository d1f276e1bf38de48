"""The operators whose bits depend on the instruction set, tested on every one that this CPU has."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import timm_ext

FILES = (
    "test_conv_square.py",
    "test_upsampled_conv3d.py",
    "test_small_conv.py",
    "test_strided.py",
    "test_weight_gradient.py",
    "test_winograd.py",
)


@pytest.mark.parametrize("isa", timm_ext.build_info()["isa_built"])
def test_the_convolutions_on_every_instruction_set(isa) -> None:
    if isa == timm_ext.build_info()["isa_chosen"]:
        pytest.skip("the tests themselves run on it")
    folder = Path(__file__).parent
    command = [sys.executable, "-m", "pytest", "-q", *(str(folder / name) for name in FILES)]
    environment = {**os.environ, "TIMM_EXT_ISA": isa}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=folder)
    if "must be one of" in run.stdout + run.stderr:
        pytest.skip(f"this CPU has no {isa}")
    assert run.returncode == 0, run.stdout
