"""What the tests of the commands work on."""

import pytest
from cli_cases import save_source

from timm_ext.cli import run


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    """Two tumour cases, two parcellation cases and two source networks with Fishers."""
    folder = tmp_path_factory.mktemp("cli")
    sizes = ["--count", "2", "--spacing", "8", "--size", "20", "24", "20"]
    assert run(["phantom", str(folder / "tumours"), "--task", "brats", *sizes]) == 0
    assert run(["phantom", str(folder / "brains"), "--task", "parcellation-1-7", *sizes]) == 0
    save_source(folder / "M1.safetensors", "parcellation-1-7", seed=1)
    save_source(folder / "M2.safetensors", "parcellation-8-14", seed=2)
    for number in (1, 2):
        fisher = [
            str(folder / f"M{number}.safetensors"),
            str(folder / "brains"),
            "--out",
            str(folder / f"F{number}.safetensors"),
        ]
        assert run(["fisher", *fisher, "--limit", "1"]) == 0
    return folder
