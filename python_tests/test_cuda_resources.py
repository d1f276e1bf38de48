"""The committed report on the CUDA kernels: what it says, and that it speaks of all of them."""

import json
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = ROOT / "csrc"
REPORT = ROOT / "benchmarks" / "results" / "cuda_resources.json"

pytestmark = pytest.mark.skipif(not SOURCES.is_dir(), reason="the tests run without the sources")


@pytest.fixture(scope="module")
def kernels() -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(REPORT.read_text(encoding="utf-8"))["kernels"]
    return rows


def test_no_kernel_spills_registers(kernels: list[dict[str, Any]]) -> None:
    spilling = [row for row in kernels if row["spill_bytes"] > 0 or row["stack_bytes"] > 0]
    assert spilling == []


def test_every_source_is_reported_for_both_architectures(kernels: list[dict[str, Any]]) -> None:
    reported = {(row["source"], row["architecture"]) for row in kernels}
    sources = [source.relative_to(SOURCES).as_posix() for source in SOURCES.glob("*/cuda/*.cu")]
    assert sources
    assert reported == {(source, architecture) for source in sources for architecture in ("sm_80", "sm_90")}


@pytest.mark.parametrize("kernel", ["forward", "backward"])
@pytest.mark.parametrize("element", ["float32", "bfloat16", "float16"])
def test_merges_of_up_to_sixteen_models_stay_in_registers(
    kernels: list[dict[str, Any]], kernel: str, element: str
) -> None:
    names = {row["kernel"] for row in kernels}
    for models in (2, 3, 4, 5, 8, 16):
        assert f"{kernel}_kernel: {element}, T={models}" in names
        assert f"{kernel}_kernel: {element}, T={models}, no Fisher" in names


def test_three_blocks_of_the_convolution_fit_on_a_multiprocessor(kernels: list[dict[str, Any]]) -> None:
    rows = [row for row in kernels if row["kernel"].startswith("conv_square_kernel")]
    assert {row["kernel"] for row in rows} == {f"conv_square_kernel: window={window}" for window in (1, 3)}
    assert all(3 * 128 * row["registers"] <= 65536 and row["shared_bytes"] == 0 for row in rows)


def test_enough_bytes_are_on_their_way(kernels: list[dict[str, Any]]) -> None:
    bytes_in_flight = [row["bytes_in_flight_per_sm"] for row in kernels if "bytes_in_flight_per_sm" in row]
    assert bytes_in_flight
    assert min(bytes_in_flight) >= 25_500  # Little's law for an H200, see cuda_resources.py
