"""Names are printed as they are: no markup, no orders to the terminal, in any encoding."""

import io
import os
import subprocess
import sys

import pytest
from rich.console import Console

from timm_ext.system.terminal import (
    accept_any_text,
    duration,
    make_bars,
    make_console,
    say,
    show_table,
    tell,
)

EVIL = "[/bold]a[red]\x1b[31m\nb:smile:\r"
SHOWN = "[/bold]a[red]\\x1b[31m\\nb:smile:\\r"


def test_say_shows_control_characters(capsys):
    say(EVIL)
    say("one\ntwo", lines=True)
    assert capsys.readouterr().out == f"{SHOWN}\none\ntwo\n"


@pytest.mark.parametrize("markup", [False, True])
def test_tables_and_lines_take_names_as_they_are(markup):
    console = Console(file=io.StringIO(), width=200, markup=markup, force_terminal=False)
    show_table(console, (EVIL, "Dice"), [(EVIL, 0.5)], title=EVIL)
    tell(console, EVIL)
    out = console.file.getvalue()
    assert out.count(SHOWN) == 4
    assert "\x1b" not in out
    assert "0.5" in out


def test_progress_bars_take_names_as_they_are(capsys):
    with make_bars(console=Console(file=(out := io.StringIO()), width=200, force_terminal=True)) as bar:
        row = bar.add_task(EVIL, total=2)
        bar.update(row, advance=1)
        bar.refresh()
    assert SHOWN in out.getvalue()
    assert "\x1b[31m\nb" not in out.getvalue()


def test_the_time_taken_stands_apart_from_the_time_left():
    now = [0.0]
    console = Console(file=(out := io.StringIO()), width=200, force_terminal=True)
    with make_bars(console=console, get_time=lambda: now[0], auto_refresh=False) as bar:
        row = bar.add_task("training", total=100)
        bar.refresh()
        for now[0] in (2.0, 4.0):
            bar.update(row, advance=10)
        bar.refresh()
    assert "0:00:00, left -:--:--" in out.getvalue()
    assert "0:00:04, left 0:00:16" in out.getvalue()


def test_a_stream_without_the_characters_gets_the_closest_ones():
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    accept_any_text(stream)
    stream.write("3 ± 1 × “2” − α…ü\ud800")
    stream.flush()
    assert stream.buffer.getvalue() == rb"""3 +- 1 x "2" - alpha...\xfc\ud800"""


def test_consoles_take_markup_for_text(capsys):
    make_console().print("[red]x[/red] :smile:")
    assert capsys.readouterr().out == "[red]x[/red] :smile:\n"


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["info"],
        ["info", "--settings"],
        *([name, "--help"] for name in ("demo", "phantom", "prepare", "train", "fisher", "merge", "adapt")),
        *([name, "--help"] for name in ("predict", "evaluate", "study")),
    ],
)
def test_help_and_information_in_ascii(arguments):
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "LC_ALL": "C", "PYTHONUTF8": "0"}
    command = [sys.executable, "-m", "timm_ext", *arguments]
    result = subprocess.run(command, capture_output=True, env=environment, check=False)
    assert result.returncode == 0, result.stderr.decode()
    assert result.stdout.decode("ascii")
    assert not result.stderr


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (119, "119 s"), (120, "2.0 min"), (7200, "2.0 h"), (86400 * 3, "3.0 days")],
)
def test_durations_for_readers(seconds, text):
    assert duration(seconds) == text
