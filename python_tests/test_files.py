import hashlib
import math
import os
import stat
from pathlib import Path

import pytest

from timm_ext.errors import InputError
from timm_ext.files import atomic_write, read_json, sha256, write_json


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
