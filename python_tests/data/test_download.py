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


def test_a_data_set_is_unpacked_under_its_name(tmp_path, archive):
    def packed(path):
        made = tmp_path / "made"
        made.mkdir()
        (made / "dataset.json").write_text("{}")
        with tarfile.open(path, "w") as tar:
            tar.add(made, "Task04_Hippocampus")

    archive(packed)
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


def test_other_names_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"expected a folder named after .*Task04_Hippocampus"):
        download_decathlon(tmp_path / "hippocampus")
