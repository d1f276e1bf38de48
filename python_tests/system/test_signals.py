import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from timm_ext.errors import InputError
from timm_ext.system import signals
from timm_ext.system.processes import worker_pool
from timm_ext.system.signals import Interrupted, ending, received, uninterrupted, watched

ALL = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


@pytest.fixture(autouse=True)
def _usual_handlers():
    """A shell starts what it runs in the background deaf to SIGINT."""
    before = {number: signal.getsignal(number) for number in ALL}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def send(number):
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", ALL)
def test_a_signal_is_raised_and_known_until_the_end(number):
    before = signal.getsignal(number)
    with pytest.raises(Interrupted) as caught, watched():  # noqa: PT012
        try:
            send(number)
        finally:
            assert received() == number
    assert caught.value.number == number
    assert isinstance(caught.value, KeyboardInterrupt)
    assert signal.getsignal(number) is before
    assert received() is None


def test_a_block_that_is_not_interrupted_ends_first():
    done = []
    with pytest.raises(Interrupted), watched():  # noqa: PT012
        with uninterrupted():
            with uninterrupted():
                send(signal.SIGTERM)
                done.append(1)
            done.append(2)
        done.append(3)
    assert done == [1, 2]


def test_an_error_of_such_a_block_comes_first():
    with pytest.raises(InputError, match="first"), watched(), uninterrupted():  # noqa: PT012
        send(signal.SIGTERM)
        raise InputError("first")


def test_two_signals_in_a_row_are_one():
    cleaned = []
    with pytest.raises(Interrupted) as caught, watched():  # noqa: PT012
        try:
            send(signal.SIGINT)
        finally:
            send(signal.SIGTERM)
            with ending():
                send(signal.SIGINT)
                cleaned.append(1)
            cleaned.append(2)
    assert cleaned == [1, 2]
    assert caught.value.number == signal.SIGINT


def test_a_signal_that_a_destructor_swallowed_is_raised_again(monkeypatch):
    monkeypatch.setattr(signals, "_SAME", 0.05)
    with pytest.raises(Interrupted), watched():  # noqa: PT012
        with suppress(KeyboardInterrupt):
            send(signal.SIGTERM)
        time.sleep(0.1)
        with uninterrupted():
            pytest.fail("the next block begins")


class Destroyed:
    def __del__(self):
        send(signal.SIGTERM)
        time.sleep(0)


def test_a_signal_in_a_destructor_comes_again_without_a_word(capsys):
    def work():
        Destroyed()
        time.sleep(10)

    begin = time.monotonic()
    with pytest.raises(Interrupted), watched():
        work()
    assert time.monotonic() - begin < 9
    assert capsys.readouterr().err == ""


def test_cleaning_up_without_a_signal_lets_the_next_one_through():
    with pytest.raises(Interrupted), watched():  # noqa: PT012
        with ending():
            pass
        send(signal.SIGTERM)


def test_ignored_signals_and_handlers_of_others_stay():
    heard = []
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    with watched():
        send(signal.SIGHUP)
        send(signal.SIGTERM)
    assert heard == [signal.SIGTERM]


def test_without_a_watch_blocks_do_nothing():
    with uninterrupted(), ending():
        assert received() is None


POOL = """
import os, sys, time
from pathlib import Path
from timm_ext.system.processes import worker_pool
def work(folder):
    Path(folder, str(os.getpid())).touch()
    time.sleep(60)
if __name__ == "__main__":
    with worker_pool(2, "sleeps") as pool:
        list(pool.map(work, [sys.argv[1]] * 4))
"""


def alive(pid):
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    return False


def wait_until(true, seconds=60):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_workers_end_with_their_parent(tmp_path, number):
    program = tmp_path / "program.py"
    program.write_text(POOL)
    marks = tmp_path / "marks"
    marks.mkdir()
    process = subprocess.Popen([sys.executable, str(program), str(marks)], stderr=subprocess.PIPE, text=True)
    wait_until(lambda: len(list(marks.iterdir())) == 2)
    workers = [int(path.name) for path in marks.iterdir()]
    assert all(map(alive, workers))
    process.send_signal(number)
    process.communicate(timeout=30)
    wait_until(lambda: not any(map(alive, workers)))


def killed(_):
    os._exit(9)


def test_a_killed_worker_is_one_line():
    with (
        pytest.raises(InputError, match=r"workers: a process that fails was killed, .* \(got 2\)"),
        worker_pool(2, "fails") as pool,
    ):
        list(pool.map(killed, range(3)))


STUBBORN = """
import time
from timm_ext.system.signals import uninterrupted, watched
with watched(), uninterrupted():
    print("busy", flush=True)
    time.sleep(60)
"""


def test_who_asks_three_times_is_heard_at_once():
    process = subprocess.Popen([sys.executable, "-c", STUBBORN], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "busy\n"
    for _ in range(2):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
        time.sleep(1.2)
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 143


@pytest.mark.parametrize("number", ALL)
def test_a_command_that_is_still_loading_ends_with_one_line(tmp_path, number):
    (tmp_path / "torch.py").write_text("import time\nprint('loading', flush=True)\ntime.sleep(60)\n")
    places = os.pathsep.join([str(tmp_path), *sys.path])
    process = subprocess.Popen(
        [sys.executable, "-m", "timm_ext", "info"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": places},
    )
    assert process.stdout.readline() == "loading\n"
    process.send_signal(number)
    _, error = process.communicate(timeout=30)
    by = "" if number == signal.SIGINT else f" by {signal.Signals(number).name}"
    assert (process.returncode, error) == (128 + number, f"error: interrupted{by}\n")


def test_the_package_leaves_the_signals_of_its_users_alone():
    code = "import signal, timm_ext; print([signal.getsignal(n) for n in (2, 15, 1)])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.count("SIG_DFL") == 2
    assert "default_int_handler" in done.stdout


FORKS = """
import atexit, importlib, json, os, signal, sys, threading, time
from timm_ext import cli
from timm_ext.system import signals

folder = sys.argv.pop(1)

@cli.app.command()
def tiny():
    print("done")  # into a buffer

def outcome(run, number, name):
    \"\"\"Run a command in a fork of this process, to its very end; None where it is not asked to end.\"\"\"
    told, note = os.pipe()
    child = os.fork()
    if not child:
        for stream in (1, 2):
            os.dup2(os.open(f"{folder}/{name}.{stream}", os.O_CREAT | os.O_WRONLY), stream)
        sys.argv[1:] = ["tiny"]
        def send(*_):
            os.write(note, b"x")
            os.kill(os.getpid(), number)
            time.sleep(0.02)
        run(send)
    os.close(note)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    asked = os.read(told, 1)
    os.close(told)
    texts = [open(f"{folder}/{name}.{stream}").read() for stream in (1, 2)]
    return (code, *texts) if asked else None
"""

AT_THE_END = """
class Finalised:
    def __init__(self, send):
        self.send = send
    def __del__(self):
        self.send()

def behind_main(send):
    try:
        cli.main()
    finally:
        send()

def thread(send):
    threading._register_atexit(send)
    cli.main()

def first_at_exit(send):
    atexit.register(send)
    cli.main()

def last_at_exit(send):
    try:
        cli.main()
    finally:
        atexit.register(send)

def finaliser(send):
    sys.modules["kept"] = Finalised(send)
    cli.main()

for run in (behind_main, thread, first_at_exit, last_at_exit, finaliser):
    for number in signals.SIGNALS:
        name = f"{run.__name__} {number.name}"
        print(json.dumps([name, *outcome(run, number, name)]), flush=True)
"""

AT_ANY_MOMENT = """
number, every = int(sys.argv.pop(1)), int(sys.argv.pop(1))
modules = [importlib.import_module(name) for name in ("timm_ext.cli", "timm_ext.cli.app")]
FILES = {module.__file__ for module in (*modules, signals)}

def at(moment):
    def run(send):
        passed = 0
        def trace(frame, event, _):
            nonlocal passed
            if frame.f_code.co_filename not in FILES:
                return None
            passed += 1
            if passed == moment:
                send()
            return trace
        sys.settrace(trace)
        try:
            cli.main()
        except SystemExit as end:
            sys.stdout.flush()
            os._exit(end.code)  # what follows takes longer, and is tried above
    return run

moment = 1
while found := outcome(at(moment), number, moment):
    print(json.dumps([moment, *found]), flush=True)
    moment += every
"""


def outcomes(folder, program, *arguments):
    script = folder / "timm-ext"
    script.write_text(FORKS + program)
    command = [sys.executable, str(script), str(folder), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_a_command_that_has_ended_leaves_with_its_status(tmp_path):
    found = outcomes(tmp_path, AT_THE_END)
    assert len(found) == 15
    assert [place for place, *rest in found if rest != [0, "done\n", ""]] == []


@pytest.mark.parametrize(("number", "every"), [(signal.SIGTERM, 2), (signal.SIGINT, 9), (signal.SIGHUP, 9)])
def test_a_signal_at_any_moment_of_a_command_is_told_or_too_late(tmp_path, number, every):
    early = [128 + number, "", "error: interrupted\n"]
    how = "" if number == signal.SIGINT else f" by {number.name}"
    told = [[128 + number, output, f"error: interrupted{how}\n"] for output in ("", "done\n")]
    found = outcomes(tmp_path, AT_ANY_MOMENT, number.value, every)
    assert [line for line in found if line[1:] not in ([0, "done\n", ""], early, *told)] == []
    assert {code for _, code, *_ in found} == {0, 128 + number}
    assert len(found) * every > 100
