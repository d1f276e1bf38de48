import numpy as np
import pytest

from timm_ext.data.store import read_array, read_notes, write_entry
from timm_ext.errors import InputError


@pytest.fixture
def entry(tmp_path):
    path = tmp_path / "cache" / "a.safetensors"
    arrays = {"image": np.arange(24, dtype=np.float32).reshape(2, 3, 4), "label": np.eye(3, dtype=np.uint8)}
    write_entry(path, arrays, {"grid": [1, 2]})
    return path


def test_round_trip(entry):
    assert read_notes(entry) == {"grid": [1, 2]}
    assert read_array(entry, "image").tolist() == np.arange(24.0).reshape(2, 3, 4).tolist()
    assert read_array(entry, "label").tolist() == np.eye(3).tolist()
    assert [path.name for path in entry.parent.iterdir()] == ["a.safetensors"]


def test_strided_arrays_are_stored_as_they_look(tmp_path):
    array = np.arange(6, dtype=np.float32).reshape(2, 3).T[::-1]
    write_entry(tmp_path / "a.safetensors", {"x": array}, {})
    assert np.array_equal(read_array(tmp_path / "a.safetensors", "x"), array)
    assert read_notes(tmp_path / "a.safetensors") == {}


def test_absent_truncated_and_altered_entries_have_no_notes(entry):
    content = entry.read_bytes()
    assert read_notes(entry.with_name("none.safetensors")) is None
    for length in (0, 5, len(content) // 2, len(content) - 1):
        entry.write_bytes(content[:length])
        assert read_notes(entry) is None
    entry.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert read_notes(entry) is None
    entry.write_bytes(content)
    assert read_notes(entry) is not None


def test_reading_a_vanished_entry(entry):
    entry.unlink()
    with pytest.raises(InputError, match=r"a\.safetensors: the cached case cannot be read, prepare it again"):
        read_array(entry, "image")


def test_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"a\.safetensors: cannot be written"):
        write_entry(tmp_path / "file" / "a.safetensors", {"x": np.ones(1)}, {})
