"""Includes among the C++ sources go one way, and no file of the CPU's sees one of CUDA's or the reverse."""

import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

import pytest

SOURCES = Path(__file__).parent.parent / "csrc"

FAMILIES = {"merge", "fisher", "conv3d", "norm", "memory"}
KERNELS = {"math", "cpu", "cuda", "*/problem.h", "*/cpu", "*/cuda"}

# What the files of a unit may include besides those of the unit itself; * stands for their own family.
ALLOWED: dict[str, set[str]] = {
    "math": set(),
    "cpu": {"math"},
    "cuda": {"math"},
    "*/problem.h": {"math"},
    "*/cpu": {"math", "cpu", "*/problem.h"},
    "*/cuda": {"math", "cuda", "*/problem.h"},
    "checks.h": {"math"},
    "cuda_launch.h": {"checks.h", "cuda"},
    "operators.h": set(),
    "guarded.h": set(),
    "*": KERNELS | {"checks.h", "cuda_launch.h", "operators.h"},
    "library.cpp": {"guarded.h", "operators.h"},
    "host.cpp": {"math", "cpu", "memory/cpu"},
    "tests": KERNELS | {f"{family}/{part}" for family in FAMILIES for part in ("problem.h", "cpu", "cuda")},
}
SEES_TORCH = {"checks.h", "cuda_launch.h", "operators.h", "*", "library.cpp"}
SEES_CUDA = {"cuda", "*/cuda", "tests"}

needs_sources = pytest.mark.skipif(not SOURCES.is_dir(), reason="the tests run without the sources")


def unit_of(file: str) -> str:
    """The row of the table that a file belongs to, with its family's name in place of *."""
    parts = PurePosixPath(file).parts
    if parts[0] in FAMILIES and (parts[1] in ("cpu", "cuda", "problem.h")):
        return "/".join(parts[:2])
    return parts[0]


def row_of(unit: str) -> str:
    family, slash, part = unit.partition("/")
    return f"*{slash}{part}" if family in FAMILIES else unit


def faults(sources: Mapping[str, str]) -> list[str]:
    """What is wrong with the includes of files, given by their paths below csrc."""
    found = []
    for file, text in sources.items():
        unit = unit_of(file)
        row, family = row_of(unit), unit.partition("/")[0]
        allowed = {unit} | {part.replace("*", family) for part in ALLOWED.get(row, set())}
        if row not in ALLOWED:
            found.append(f"{file}: give {unit} a place in the table")
        for mark, included in re.findall(r'^\s*#\s*include\s*(["<])([^">]+)[">]', text, re.MULTILINE):
            if mark == '"' and included not in sources:
                found.append(f"{file} includes {included}, which is no path below csrc")
            elif included in sources and unit_of(included) not in allowed:
                found.append(f"{file} includes {included}")
        for system in re.findall(r"^\s*#\s*include\s*<([^>]+)>", text, re.MULTILINE):
            if system.startswith("torch/") and row not in SEES_TORCH:
                found.append(f"{file} includes {system}")
            if system.startswith("cuda") and row not in SEES_CUDA:
                found.append(f"{file} includes {system}")
    return found


@pytest.fixture(scope="module")
def sources() -> dict[str, str]:
    files = [path for path in SOURCES.rglob("*") if path.suffix in {".h", ".cpp", ".cu"}]
    return {path.relative_to(SOURCES).as_posix(): path.read_text(encoding="utf-8") for path in files}


@needs_sources
def test_includes_go_one_way(sources: dict[str, str]) -> None:
    assert len(sources) > 100
    assert faults(sources) == []


@needs_sources
def test_every_row_of_the_table_has_files(sources: dict[str, str]) -> None:
    assert {row_of(unit_of(file)) for file in sources} == ALLOWED.keys()
    assert {unit_of(file).partition("/")[0] for file in sources} > FAMILIES


@pytest.mark.parametrize(
    ("file", "included"),
    [
        ("merge/cpu/forward.cpp", "merge/cuda/launchers.h"),
        ("merge/cuda/forward.cu", "merge/cpu/view.h"),
        ("cpu/storage.h", "cuda/storage.h"),
        ("cuda/storage.h", "cpu/storage.h"),
        ("fisher/cpu/square.cpp", "merge/cpu/view.h"),
        ("fisher/square.cpp", "merge/problem.h"),
        ("merge/problem.h", "cpu/storage.h"),
        ("math/exp.h", "cpu/storage.h"),
        ("conv3d/cpu/tile.h", "checks.h"),
    ],
)
def test_a_wrong_include_is_found(file: str, included: str) -> None:
    assert faults({file: f'#include "{included}"\n', included: ""}) == [f"{file} includes {included}"]


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("merge/cpu/forward.cpp", "#include <cuda_runtime.h>"),
        ("merge/cuda/forward.cu", "#include <torch/csrc/stable/tensor.h>"),
        ("merge/cpu/forward.cpp", '  # include "view.h"'),
        ("merge/cuda/forward.cu", "#include <merge/cpu/view.h>"),
        ("attic/forward.cpp", ""),
    ],
)
def test_other_faults_are_found(file: str, text: str) -> None:
    assert len(faults({file: text, "merge/cpu/view.h": ""})) == 1


def test_right_includes_are_none() -> None:
    files = ["merge/problem.h", "merge/cpu/view.h", "math/exp.h"]
    text = "#include <vector>\n" + "".join(f'#include "{file}"\n' for file in files)
    assert faults({"merge/cpu/forward.cpp": text, **dict.fromkeys(files, "")}) == []


def test_the_table_has_no_cycle() -> None:
    left = {row: {row_of(unit) for unit in allowed} for row, allowed in ALLOWED.items()}
    while left:
        free = {row for row, allowed in left.items() if not allowed & left.keys()}
        assert free, f"cycle among {sorted(left)}"
        left = {row: allowed for row, allowed in left.items() if row not in free}
