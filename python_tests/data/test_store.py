import json

import numpy as np
import pytest
from safetensors.numpy import save

from timm_ext.data.store import read_array, read_entry, write_entry
from timm_ext.errors import InputError


@pytest.fixture
def entry(tmp_path):
    path = tmp_path / "cache" / "a.safetensors"
    arrays = {"image": np.arange(24, dtype=np.float32).reshape(2, 3, 4), "label": np.eye(3, dtype=np.uint8)}
    write_entry(path, arrays, {"grid": [1, 2]})
    return path


def notes(path):
    entry = read_entry(path)
    assert entry is not None
    return entry.notes


def test_round_trip(entry):
    assert notes(entry) == {"grid": [1, 2]}
    assert read_array(entry, "image").tolist() == np.arange(24.0).reshape(2, 3, 4).tolist()
    assert read_array(entry, "label").tolist() == np.eye(3).tolist()
    assert [path.name for path in entry.parent.iterdir()] == ["a.safetensors"]


def test_strided_arrays_are_stored_as_they_look(tmp_path):
    array = np.arange(6, dtype=np.float32).reshape(2, 3).T[::-1]
    write_entry(tmp_path / "a.safetensors", {"x": array}, {})
    assert np.array_equal(read_array(tmp_path / "a.safetensors", "x"), array)
    assert notes(tmp_path / "a.safetensors") == {}


def test_absent_truncated_and_altered_entries_have_no_notes(entry):
    content = entry.read_bytes()
    assert read_entry(entry.with_name("none.safetensors")) is None
    for length in (0, 5, len(content) // 2, len(content) - 1):
        entry.write_bytes(content[:length])
        assert read_entry(entry) is None
    entry.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert read_entry(entry) is None
    entry.write_bytes(content)
    assert read_entry(entry) is not None


def test_reading_a_vanished_entry(entry):
    entry.unlink()
    with pytest.raises(InputError, match=r"a\.safetensors: the cached case cannot be read, prepare it again"):
        read_array(entry, "image")


def test_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"a\.safetensors: cannot be written"):
        write_entry(tmp_path / "file" / "a.safetensors", {"x": np.ones(1)}, {})


def test_every_flipped_bit_is_noticed(entry):
    """But for bits that change nothing: spaces behind the header, and its offsets' leading zeros."""
    content = entry.read_bytes()
    whole = read_entry(entry)
    arrays = {name: read_array(entry, name) for name in whole.arrays}
    accepted = 0
    for position in range(len(content)):
        changed = bytearray(content)
        changed[position] ^= 1 << position % 8
        entry.write_bytes(changed)
        if read_entry(entry) is not None:
            accepted += 1
            assert read_entry(entry) == whole
            assert all(np.array_equal(read_array(entry, name), array) for name, array in arrays.items())
    assert accepted <= 8


def test_a_flipped_bit_is_noticed_when_an_array_is_read(entry):
    content = bytearray(entry.read_bytes())
    content[-30] ^= 1
    entry.write_bytes(content)
    with pytest.raises(InputError, match=r"prepare it again \(image is damaged\)"):
        read_array(entry, "image")
    assert read_array(entry, "label").tolist() == np.eye(3).tolist()


def test_an_entry_of_another_form_is_none(tmp_path):
    path = tmp_path / "a.safetensors"
    good = {"notes": {}, "arrays": {"x": {"dtype": "<f4", "shape": [2], "crc32": 0}}, "digest": "0" * 64}
    odd = [None, 3, "x", [], {}, float("nan"), {"notes": {"a": [[[]]]}}]
    records = [*odd, *({**good, key: value} for key in good for value in odd)]
    for record in records:
        path.write_bytes(save({"x": np.zeros(2, np.float32)}, {"timm_ext": json.dumps(record)}))
        assert read_entry(path) is None
        with pytest.raises(InputError, match="prepare it again"):
            read_array(path, "x")
    path.write_bytes(save({"x": np.zeros(2, np.float32)}))
    assert read_entry(path) is None
