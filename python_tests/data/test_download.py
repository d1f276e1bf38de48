import logging
import tarfile
import urllib.error

import pytest

from timm_ext.data.download import download_decathlon
from timm_ext.errors import InputError


@pytest.fixture
def archive(monkeypatch):
    """Let MONAI take the data set from a file instead of the network; the checksum stays its business."""
    from monai.apps import utils

    def put(make):
        monkeypatch.setattr(utils, "download_url", lambda url, path, *args, **options: make(path))

    return put


def packed(place, name="Task04_Hippocampus"):
    """Write an archive of a folder of some name, which is made in a place."""

    def write(path):
        made = place / "made"
        made.mkdir()
        (made / "dataset.json").write_text("{}")
        with tarfile.open(path, "w") as tar:
            tar.add(made, name)

    return write


def test_a_data_set_is_unpacked_under_its_name(tmp_path, archive):
    archive(packed(tmp_path))
    folder = tmp_path / "data" / "Task04_Hippocampus"
    folder.parent.mkdir()
    download_decathlon(folder)
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    assert (folder / "dataset.json").read_text() == "{}"
    archive(None)
    download_decathlon(folder)  # it is there


def test_without_network_it_says_what_to_fetch(tmp_path, archive):
    def failed(path):
        raise urllib.error.URLError("no route to host")

    archive(failed)
    with pytest.raises(InputError, match=r"Task04_Hippocampus: expected to download it from https.*no route"):
        download_decathlon(tmp_path / "Task04_Hippocampus")
    assert not list(tmp_path.iterdir())


def test_an_archive_of_another_folder_is_refused(tmp_path, archive):
    archive(packed(tmp_path, "Task09_Spleen"))
    with pytest.raises(InputError, match=r"Task04_Hippocampus: expected to download it from https.*No such"):
        download_decathlon(tmp_path / "data" / "Task04_Hippocampus")


def test_a_folder_that_holds_something_else_is_left_alone(tmp_path, archive):
    archive(packed(tmp_path))
    folder = tmp_path / "Task04_Hippocampus"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(
        InputError, match=r"Task04_Hippocampus: expected to download it from https.*not empty"
    ):
        download_decathlon(folder)
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]


def test_what_monai_logs_is_as_before(tmp_path, archive):
    notes = logging.getLogger("monai.apps")
    before = notes.level
    archive(packed(tmp_path))
    download_decathlon(tmp_path / "Task04_Hippocampus")
    assert notes.level == before


def test_other_names_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"expected a folder named after .*Task04_Hippocampus"):
        download_decathlon(tmp_path / "hippocampus")
