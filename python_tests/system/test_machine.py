"""Memory is reckoned before it is taken."""

import resource
import subprocess
import sys

import pytest

from timm_ext.errors import InputError
from timm_ext.system import machine
from timm_ext.system.machine import available_memory, check_memory, check_workers, total_memory


def test_the_available_memory_is_no_more_than_there_is():
    pages = resource.getpagesize()
    assert 0 < available_memory() < 2**50
    with open("/proc/meminfo", encoding="ascii") as file:
        total = int(file.readline().split()[1]) * 1024
    assert pages < available_memory() <= total_memory() <= total


def test_the_control_group_bounds_it(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "_CGROUP", tmp_path)
    assert machine._of_group() == float("inf")
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("1000\n")
    (tmp_path / "memory.stat").write_text("anon 300\nfile 700\n")
    assert machine._of_group() == float("inf")
    (tmp_path / "memory.max").write_text("5000\n")
    assert machine._of_group() == 5000 - 1000 + 700
    assert available_memory() == 4700
    assert total_memory() == 5000


def test_the_limits_of_the_process_bound_it():
    program = (
        "import resource; from timm_ext.system.machine import available_memory\n"
        "resource.setrlimit(resource.RLIMIT_AS, (3 << 30, 3 << 30)); print(available_memory())"
    )
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert 0 <= int(said) < 3 << 30


def test_work_that_needs_more_is_refused():
    check_memory(100, "a volume", available=100)
    with pytest.raises(
        InputError, match=r"^a volume: expected at most 2\.0 GiB of memory, which is free \(got 3\.0 GiB\)$"
    ):
        check_memory(3 << 30, "a volume", available=2 << 30)
    with pytest.raises(InputError, match=r"\(got 1,024.0 PiB\)"):
        check_memory(2**60, "a volume")


def test_workers_take_memory_each():
    check_workers(4, available=1 << 30)
    with pytest.raises(InputError, match=r"^workers: 1000 processes: expected at most 1\.0 GiB"):
        check_workers(1000, available=1 << 30)
