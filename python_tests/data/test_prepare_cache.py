"""The cache of prepared cases: what it depends on, what is damaged in it, who else writes to it."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
from prepared_cases import TASK, make_case, rewrite

from timm_ext.data import prepare, preprocess
from timm_ext.data.prepare import PrepareSettings, prepare_case
from timm_ext.data.store import write_entry
from timm_ext.errors import InputError
from timm_ext.files import atomic_write


@pytest.fixture
def builds(monkeypatch):
    """The names of the cases that were really built."""
    names, build = [], preprocess.build_arrays

    def counted(case, *rest):
        names.append(case.id)
        return build(case, *rest)

    monkeypatch.setattr(preprocess, "build_arrays", counted)
    return names


def test_cache_is_used_and_gives_the_same(tmp_path, builds):
    case, cache = make_case(tmp_path / "case"), tmp_path / "cache"
    first = prepare_case(case, TASK, PrepareSettings(), cache)
    second = prepare_case(case, TASK, PrepareSettings(), cache)
    fresh = prepare_case(case, TASK, PrepareSettings(), None)
    assert builds == ["a", "a"]
    for other in (second, fresh, first.in_memory()):
        assert np.array_equal(first.image, other.image)
        assert np.array_equal(first.label, other.label)
        assert first.grid.to_dict() == other.grid.to_dict()
        assert first.present == other.present
    assert len(list(cache.iterdir())) == 1


def test_cache_follows_settings_task_and_content(tmp_path, builds, monkeypatch):
    case, cache = make_case(tmp_path / "case"), tmp_path / "cache"
    prepare_case(case, TASK, PrepareSettings(), cache)
    prepare_case(case, TASK, PrepareSettings(multiple=2), cache)
    prepare_case(case, replace(TASK, modalities=("T2", "T1")), PrepareSettings(), cache)
    prepare_case(replace(case, label=None), TASK, PrepareSettings(), cache)
    rewrite(case.images["T1"], data=np.flip(np.asanyarray(nib.load(case.images["T1"]).dataobj)))
    prepare_case(case, TASK, PrepareSettings(), cache)
    monkeypatch.setattr(prepare, "_code_version", lambda: "another version")
    prepare_case(case, TASK, PrepareSettings(), cache)
    assert len(builds) == len(list(cache.iterdir())) == 6


def test_cache_is_shared_by_tasks_that_differ_in_regions_only(tmp_path, builds):
    case, cache = make_case(tmp_path / "case"), tmp_path / "cache"
    prepare_case(case, TASK, PrepareSettings(), cache)
    prepare_case(case, replace(TASK, name="core", regions=TASK.regions[1:]), PrepareSettings(), cache)
    assert builds == ["a"]


@pytest.mark.parametrize("keep", [0.0, 0.5, 0.999])
def test_damaged_cache_entry_is_made_again(tmp_path, builds, keep):
    case, cache = make_case(tmp_path / "case"), tmp_path / "cache"
    image = prepare_case(case, TASK, PrepareSettings(), cache).image
    (path,) = cache.iterdir()
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content))])
    assert np.array_equal(prepare_case(case, TASK, PrepareSettings(), cache).image, image)
    assert len(builds) == 2
    assert path.read_bytes() == content


def test_many_writers_of_one_entry(tmp_path):
    case, cache = make_case(tmp_path / "case"), tmp_path / "cache"
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: prepare_case(case, TASK, PrepareSettings(), cache).image, range(8)))
    assert all(np.array_equal(result, results[0]) for result in results)
    assert len(list(cache.iterdir())) == 1


def test_cache_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        prepare_case(make_case(tmp_path), TASK, PrepareSettings(), tmp_path / "file" / "cache")


@pytest.mark.parametrize("position", [-1, -2000, 300, 600, 1000])
def test_an_altered_entry_is_made_again(tmp_path, position):
    case, cache = make_case(tmp_path), tmp_path / "cache"
    whole = prepare_case(case, TASK, PrepareSettings(), cache)
    (path,) = cache.iterdir()
    content = path.read_bytes()
    changed = bytearray(content)
    changed[position] ^= 1
    path.write_bytes(changed)
    again = prepare_case(case, TASK, PrepareSettings(), cache)
    assert path.read_bytes() == content
    assert again.grid.to_dict() == whole.grid.to_dict()


@pytest.mark.parametrize(
    "notes",
    [
        {},
        {"grid": {}, "present": []},
        {"grid": [], "present": [0]},
        {"grid": None, "present": "x"},
        {"present": [1.5]},
        {"grid": {"size": [1, 2, 3]}},
    ],
)
def test_an_entry_with_other_notes_is_made_again(tmp_path, notes):
    case, cache = make_case(tmp_path), tmp_path / "cache"
    whole = prepare_case(case, TASK, PrepareSettings(), cache)
    (path,) = cache.iterdir()
    content = path.read_bytes()
    arrays = {"image": whole.image, "label": whole.label}
    good = {"grid": whole.grid.to_dict(), "present": list(whole.present)}
    write_entry(path, arrays, {**good, **notes} if notes else notes)
    prepare_case(case, TASK, PrepareSettings(), cache)
    assert path.read_bytes() == content
    write_entry(path, {**arrays, "image": whole.image[:, :-1]}, good)
    prepare_case(case, TASK, PrepareSettings(), cache)
    assert path.read_bytes() == content


def test_what_a_killed_run_left_in_the_cache_goes_with_the_next(tmp_path):
    case, cache = make_case(tmp_path), tmp_path / "cache"
    cache.mkdir()
    gone = subprocess.run(
        [
            sys.executable,
            "-c",
            "import os, sys; from timm_ext.files import atomic_write\n"
            "with atomic_write(sys.argv[1]) as path: path.write_bytes(b'half'); os._exit(9)",
            cache / "x.safetensors",
        ]
    )
    assert gone.returncode == 9
    (left,) = cache.iterdir()
    with atomic_write(cache / "y.safetensors") as living:
        living.write_bytes(b"half")
        code = (
            "import sys; from timm_ext.files import remove_stale_partials; remove_stale_partials(sys.argv[1])"
        )
        subprocess.run([sys.executable, "-c", code, cache], check=True)
        assert living.exists()
        assert not left.exists()
        prepare_case(case, TASK, PrepareSettings(), cache)
        assert living.exists()
    assert (cache / "y.safetensors").read_bytes() == b"half"
