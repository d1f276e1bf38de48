"""What all tests share: the device they run on, the state of the random generators, helper modules."""

import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # helper modules lie beside the tests, which are no package
hypothesis.settings.register_profile("any machine", deadline=None)  # times say nothing on a busy one
hypothesis.settings.load_profile("any machine")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """As many workers as this process may use cores, at most four: each holds a gigabyte."""
    return min(len(os.sched_getaffinity(0)), 4)


@pytest.fixture(params=["cpu", "cuda"])
def device(request: pytest.FixtureRequest) -> torch.device:
    """CPU and GPU; without a GPU the test is skipped, or fails when FAIL_WITHOUT_CUDA=1."""
    if request.param == "cuda":
        reason = _why_no_cuda()
        if reason and os.environ.get("FAIL_WITHOUT_CUDA") == "1":
            pytest.fail(f"FAIL_WITHOUT_CUDA=1 and {reason}")
        if reason:
            pytest.skip(reason)
    return torch.device(request.param)


def _why_no_cuda() -> str:
    if not torch.cuda.is_available():
        return "torch finds no GPU"
    import timm_ext

    return "" if timm_ext.build_info()["cuda_built"] else "timm_ext was built without CUDA kernels"


@pytest.fixture(autouse=True)
def _restore_random_state() -> Iterator[None]:
    """Seed each test alike and put back what was, so that tests do not depend on their order."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])
