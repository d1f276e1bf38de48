import hashlib
import math
import multiprocessing
import os
import signal
import stat
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from timm_ext import files
from timm_ext.checkpoint import load_checkpoint
from timm_ext.documents import read_json
from timm_ext.errors import InputError
from timm_ext.files import (
    atomic_folder,
    atomic_write,
    check_file,
    check_outputs,
    ending_of,
    made_folder,
    real_path,
    remove_stale_partials,
    sha256,
    stem_of,
    write_json,
)


def test_content_appears_whole_under_its_name(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "scan.nii.gz"
    with atomic_write(path) as temporary:
        temporary.write_text("content")
        assert temporary.parent == path.parent
        assert temporary.name.endswith(".nii.gz")
        assert not path.exists()
    assert path.read_text() == "content"
    assert os.listdir(path.parent) == ["scan.nii.gz"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_failure_keeps_what_was_there(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "x"
    path.write_text("old")
    with pytest.raises(error), atomic_write(path) as temporary:  # noqa: PT012
        temporary.write_text("half of the new")
        raise error
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["x"]


def test_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    with (
        pytest.raises(InputError, match=r"x: cannot be written \(No space left on device\)"),
        atomic_write(tmp_path / "x"),
        open("/dev/full", "w") as full,
    ):
        full.write("content")
    assert os.listdir(tmp_path) == []


def test_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(InputError, match=r"file/x: cannot be written \("),
        atomic_write(tmp_path / "file" / "x"),
    ):
        pass


def test_name_of_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    with (
        pytest.raises(InputError, match=r"x: cannot be written \(Is a directory\)"),
        atomic_write(tmp_path / "x"),
    ):
        pass
    assert os.listdir(tmp_path) == ["x"]


def test_permissions_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        with atomic_write(tmp_path / "x") as temporary:
            temporary.touch()
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == 0o640


def test_permissions_are_the_same_whatever_the_writer_gives(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        with atomic_write(tmp_path / "x") as temporary:
            temporary.unlink()
            temporary.touch(mode=0o600)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == 0o644


def test_long_names_with_many_dots_can_be_written(tmp_path: Path) -> None:
    path = tmp_path / f"{'1.2.840.' * 30}nii.gz"
    with atomic_write(path) as temporary:
        assert temporary.name.endswith(".nii.gz")
    assert path.exists()


KILLED = """
import os, signal, sys
from timm_ext.files import atomic_folder, atomic_write
with atomic_write(sys.argv[1]) as file, atomic_folder(sys.argv[2]) as folder:
    (folder / "content").touch()
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_writer_left_goes_with_the_next_write(tmp_path: Path) -> None:
    (tmp_path / ".partial-notes").touch()
    command = [sys.executable, "-c", KILLED, tmp_path / "x.json", tmp_path / "folder"]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    assert len(os.listdir(tmp_path)) == 3
    write_json(tmp_path / "x.json", 1)
    assert sorted(os.listdir(tmp_path)) == [".partial-notes", "x.json"]


def test_what_is_being_written_stays(tmp_path: Path) -> None:
    with atomic_write(tmp_path / "x") as file, atomic_folder(tmp_path / "y") as folder:
        child = multiprocessing.get_context("spawn").Process(target=remove_stale_partials, args=[tmp_path])
        child.start()
        child.join()
        assert remove_stale_partials(tmp_path) == []
        assert sorted(tmp_path.iterdir()) == sorted([file, folder])
    assert sorted(os.listdir(tmp_path)) == ["x", "y"]


def test_writers_out_of_sight_are_gone_after_a_day(tmp_path: Path) -> None:
    digits = "0123456789abcdef" * 2
    names = [f".partial-{digits}.nii.gz", f".partial-deadbeef-{os.getpid()}-1-{digits}"]
    for name in names:
        (tmp_path / name).mkdir()
    inside = tmp_path / names[0] / "content"
    inside.touch()
    assert remove_stale_partials(tmp_path) == []
    for place in (inside, *inside.parents[:2]):
        os.utime(place, (0, 0))
    assert remove_stale_partials(tmp_path) == [tmp_path / names[0]]


def test_another_process_of_the_same_number_is_not_the_writer(tmp_path: Path) -> None:
    with atomic_write(tmp_path / "x") as temporary:
        words = temporary.name.split("-")
        other = tmp_path / "-".join([*words[:3], str(int(words[3]) - 1), words[4]])
        other.touch()
        assert remove_stale_partials(tmp_path) == [other]


def test_folder_is_whole_or_absent(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), atomic_folder(tmp_path / "x") as temporary:  # noqa: PT012
        (temporary / "content").touch()
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == []
    with atomic_folder(tmp_path / "new" / "x") as temporary:
        (temporary / "content").touch()
    assert os.listdir(tmp_path / "new" / "x") == ["content"]
    with (
        pytest.raises(InputError, match=r"x: cannot be written \(Directory not empty\)"),
        atomic_folder(tmp_path / "new" / "x"),
    ):
        pass


def test_folders_that_were_made_for_nothing_are_gone(tmp_path: Path) -> None:
    kept = tmp_path / "a" / "kept"
    with made_folder(kept):
        pass
    for name in ("", "file"):
        with suppress(KeyError), made_folder(kept / "new" / "deep"):
            if name:
                (kept / "new" / name).touch()
            raise KeyError
        assert [path.name for path in kept.rglob("*")] == (["new", "file"] if name else [])


def test_folders_that_others_made_stay(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with suppress(KeyError), made_folder(out / "own"):
        (out / "of others" / "empty").mkdir(parents=True)
        raise KeyError
    assert sorted(path.name for path in out.rglob("*")) == ["empty", "of others"]


def test_a_write_that_fails_leaves_no_folders(tmp_path: Path) -> None:
    with suppress(KeyError), made_folder(tmp_path / "out"), atomic_write(tmp_path / "out" / "b" / "x"):
        raise KeyError
    assert not list(tmp_path.iterdir())


def test_json_round_trip(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", {"a": [1, 2.5, None, "é"]})
    assert read_json(tmp_path / "x.json") == {"a": [1, 2.5, None, "é"]}


def test_json_has_no_nan(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "x.json", math.nan)
    assert os.listdir(tmp_path) == []


def test_broken_or_missing_json_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(InputError, match=r"x.json: expected JSON \(got "):
        read_json(tmp_path / "x.json")
    with pytest.raises(InputError, match=r"absent.json: cannot be read \(No such file"):
        read_json(tmp_path / "absent.json")


def test_sha256(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abc" * 1_000_000)
    assert sha256(tmp_path / "x") == hashlib.sha256(b"abc" * 1_000_000).hexdigest()
    with pytest.raises(InputError, match="absent: cannot be read"):
        sha256(tmp_path / "absent")


@pytest.mark.parametrize(
    ("name", "stem", "ending"),
    [
        ("1.3.12.2.1107.5.4.4.145.nii.gz", "1.3.12.2.1107.5.4.4.145", ".nii.gz"),
        ("2024.01.31.nii", "2024.01.31", ".nii"),
        ("v1.2.mgz", "v1.2", ".mgz"),
        ("net.v2.safetensors", "net.v2", ".safetensors"),
        ("x.tar.gz", "x.tar", ".gz"),
        ("SCAN.NII.GZ", "SCAN", ".NII.GZ"),
        ("plain", "plain", ""),
    ],
)
def test_endings_are_formats_and_other_dots_belong_to_the_name(name: str, stem: str, ending: str) -> None:
    assert (stem_of(f"a.b/{name}"), ending_of(f"a.b/{name}")) == (stem, ending)


def test_temporary_names_hold_no_dots_of_the_name(tmp_path: Path) -> None:
    name = f"{'1.2.840.' * 28}145.nii.gz"
    with atomic_write(tmp_path / name) as temporary:
        temporary.write_text("content")
        assert temporary.name.endswith(".nii.gz")
        assert "2.840" not in temporary.name
    assert os.listdir(tmp_path) == [name]


@pytest.mark.parametrize(
    ("outputs", "inputs", "message"),
    [
        (["a", "b", "a"], [], r"b?/?a: expected a name of its own for each output"),
        (["Case.nii", "case.nii"], [], r"case\.nii: expected a name of its own.*got also .*Case\.nii"),
        (["caf\u00e9", "cafe\u0301"], [], "expected a name of its own"),
        (["x/../a", "a"], [], "expected a name of its own"),
        (["b", "a"], ["a"], r"a: expected an output that is no input \(got the input .*a\)"),
        (["link"], ["a"], "expected an output that is no input"),
        (["a", "\u00e9" * 128], [], "expected a name of at most 255 bytes .got 256."),
    ],
)
def test_outputs_that_would_overwrite_are_refused(
    tmp_path: Path, outputs: list[str], inputs: list[str], message: str
) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "a").touch()
    (tmp_path / "link").symlink_to("a")
    with pytest.raises(InputError, match=message):
        check_outputs([tmp_path / name for name in outputs], [tmp_path / name for name in inputs])


def test_outputs_that_are_alone_are_taken(tmp_path: Path) -> None:
    check_outputs([tmp_path / "a", tmp_path / "b", tmp_path / "c" / "a"], [tmp_path / "d", tmp_path / "d"])


def test_a_writer_whose_process_is_hidden_counts_as_living(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(pid: int, signal: int) -> None:
        raise PermissionError(1, "Operation not permitted")

    with atomic_write(tmp_path / "x") as temporary:
        temporary.write_text("half")
        with monkeypatch.context() as change:
            change.setattr(files, "_start_of", lambda pid: None)
            change.setattr(os, "kill", refuse)
            assert remove_stale_partials(tmp_path) == []
    assert (tmp_path / "x").read_text() == "half"


def test_what_is_no_file_is_refused_before_it_is_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").touch()
    check_file(tmp_path / "file")
    for name, message in (
        (tmp_path, r"expected a file \(got a folder\)"),
        (tmp_path / "pipe", r"expected a file \(got a pipe or device\)"),
        ("/dev/zero", r"expected a file \(got a pipe or device\)"),
        ("a\0b", "expected the name of a file"),
        (tmp_path / ("x" * 300), r"cannot be read \(File name too long\)"),
        (tmp_path / "absent", r"cannot be read \(No such file"),
    ):
        for read in (check_file, sha256, load_checkpoint):
            with pytest.raises(InputError, match=message):
                read(name)


def test_links_in_a_circle_have_a_real_path(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    assert real_path(tmp_path / "a").parent == tmp_path.resolve()
    (tmp_path / "c").symlink_to(tmp_path / "there")
    assert real_path(tmp_path / "c" / "inside") == tmp_path.resolve() / "there" / "inside"
