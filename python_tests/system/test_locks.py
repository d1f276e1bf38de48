import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from timm_ext.errors import InputError
from timm_ext.system import locks
from timm_ext.system.locks import folder_lock, output_lock

HOLD = """
import sys, time
from timm_ext.system.locks import {lock}
with {lock}(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def held(tmp_path):
    """Start a process that holds a folder or a file, and end it afterwards."""
    started = []

    def hold(lock, path):
        program = [sys.executable, "-c", HOLD.format(lock=lock), str(path)]
        process = subprocess.Popen(program, stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout.readline() == "held\n"
        return process

    yield hold
    for process in started:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(("kind", "lock"), [("folder_lock", folder_lock), ("output_lock", output_lock)])
def test_what_another_process_holds_is_refused_until_it_ends(tmp_path, held, kind, lock):
    path = tmp_path / "run"
    holder = held(kind, path)
    with pytest.raises(InputError, match=rf"run: in use by another timm-ext process \({holder.pid}\)"):
        lock(path).__enter__()
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with lock(path):
        pass


def test_nothing_is_left_of_a_lock_that_was_given_back(tmp_path):
    with folder_lock(tmp_path / "run"), output_lock(tmp_path / "F.safetensors"):
        assert os.listdir(tmp_path / "run") == [".lock"]
        assert sorted(os.listdir(tmp_path)) == [".F.safetensors.lock", "run"]
    assert os.listdir(tmp_path) == ["run"]
    assert os.listdir(tmp_path / "run") == []


def test_two_locks_of_one_process_exclude_each_other(tmp_path):
    with folder_lock(tmp_path):
        with pytest.raises(InputError, match=rf"in use by another timm-ext process \({os.getpid()}\)"):
            folder_lock(tmp_path).__enter__()
        with pytest.raises(InputError, match="in use"):  # the refusal has not taken the lock away
            folder_lock(tmp_path).__enter__()


def test_a_forked_worker_does_not_hold_the_lock_on(tmp_path):
    context = multiprocessing.get_context("fork")
    release = context.Event()
    with folder_lock(tmp_path):
        worker = context.Process(target=release.wait, args=(60,))
        worker.start()
        with pytest.raises(InputError, match="in use"):
            folder_lock(tmp_path).__enter__()
    with folder_lock(tmp_path):
        assert worker.is_alive()
    release.set()
    worker.join()


def test_the_lock_of_a_process_that_is_gone_does_not_count(tmp_path):
    (tmp_path / ".lock").write_text("1 another-machine\n")
    with folder_lock(tmp_path):
        assert (tmp_path / ".lock").read_text().split()[0] == str(os.getpid())


def no_locks(*arguments):
    raise OSError(95, "Operation not supported")


def test_without_locks_a_living_process_is_respected_and_a_dead_one_is_not(tmp_path, monkeypatch):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    monkeypatch.setattr(locks.fcntl, "flock", no_locks)
    with folder_lock(tmp_path), pytest.raises(InputError, match=rf"in use .*\({os.getpid()}\)"):
        folder_lock(tmp_path).__enter__()
    (tmp_path / ".lock").write_text(f"{gone.pid} {locks.socket.gethostname()}\n")
    with folder_lock(tmp_path):
        pass


def test_a_holder_on_another_machine_is_named(tmp_path, held):
    holder = held("folder_lock", tmp_path)
    (tmp_path / ".lock").write_text(f"{holder.pid} far-away\n")
    with pytest.raises(InputError, match=rf"\({holder.pid} on far-away\)"):
        folder_lock(tmp_path).__enter__()


def test_one_of_many_that_start_together_holds(tmp_path):
    """However they meet, also where the holder removes its file while others open it."""
    program = (
        "import sys, time\n"
        "from timm_ext.system.locks import folder_lock\nfrom timm_ext.errors import InputError\n"
        "end, count = time.time() + 2, 0\n"
        "while time.time() < end:\n"
        "    try:\n"
        "        with folder_lock(sys.argv[1] + '/run'):\n"
        "            open(sys.argv[1] + '/mark', 'x').close()\n"
        "            __import__('os').unlink(sys.argv[1] + '/mark')\n"
        "            count += 1\n"
        "    except InputError:\n"
        "        pass\n"
        "print(count)\n"
    )
    crew = [
        subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    counts = [int(process.communicate()[0]) for process in crew]
    assert [process.returncode for process in crew] == [0, 0, 0]
    assert sum(counts) > 10


def test_a_place_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for lock in (folder_lock, output_lock):
        with pytest.raises(InputError, match="cannot be written"):
            lock(tmp_path / "file" / "x").__enter__()


def test_a_long_name_has_a_lock_too(tmp_path):
    with output_lock(tmp_path / ("é" * 120 + ".safetensors")):
        assert time.time() > 0
        assert len(os.listdir(tmp_path)) == 1
