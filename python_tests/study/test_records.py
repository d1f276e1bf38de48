import json
import multiprocessing

import pytest

from timm_ext.documents import read_json
from timm_ext.errors import InputError
from timm_ext.study.outcomes import Scored
from timm_ext.study.records import PLAN, Folder
from timm_ext.study.step import Step


class Plain(Step):
    x: int = 0


def step(x=0):
    return Plain(name="a", x=x)


def test_record_round_trip(tmp_path):
    folder, done = Folder(tmp_path), step(x=1)
    assert folder.record(done) is None
    folder.write_record(done, {"dice": 0.5}, seconds=1.0)
    assert folder.outcome(done, dict) == {"dice": 0.5}
    assert folder.run_path(done).name == f"a-{done.digest[:12]}"
    record = json.loads((folder.run_path(done) / "record.json").read_text())
    assert record["step"] == {"type": "Plain", "name": "a", "x": 1}


def test_unfinished_step_has_no_result(tmp_path):
    with pytest.raises(InputError, match="expected a finished step"):
        Folder(tmp_path).outcome(step(), dict)


def test_record_of_other_settings_is_refused(tmp_path):
    folder, mine = Folder(tmp_path), step()
    folder.write_record(mine, {})
    path = folder.run_path(mine) / "record.json"
    path.write_text(path.read_text().replace(mine.digest, "0" * 64))
    with pytest.raises(InputError, match="expected the record of"):
        folder.record(mine)


def test_an_altered_record_is_refused(tmp_path):
    folder, mine = Folder(tmp_path), step()
    folder.write_record(mine, {"dice": 0.5, "by": {1: (2, None)}}, seconds=1.0)
    assert folder.record(mine).seconds == 1.0
    path = folder.run_path(mine) / "record.json"
    path.write_text(path.read_text().replace("0.5", "0.6"))
    with pytest.raises(InputError, match=r"record\.json: expected a record as it was written"):
        folder.record(mine)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"curve": [[1]]}, r"record\.json: curve\.0\.1: missing"),
        ({"curve": [[1, "high"]]}, r"curve\.0\.1: expected a valid number \(got 'high'\)"),
        ({"steps": 1.5}, r"steps: expected a valid integer"),
        ({"scores": {"a": 3}}, r"scores\.a: expected named fields \(got 3\)"),
    ],
)
def test_a_result_of_another_kind_is_refused(tmp_path, change, message):
    folder, mine = Folder(tmp_path), step()
    folder.write_record(mine, {"curve": [[1, 0.5]], "steps": 1, "scores": {"a": {"WT": None}}, **change})
    with pytest.raises(InputError, match=message):
        folder.outcome(mine, Scored)


def hold(path, held, release):
    with Folder(path).lock():
        held.set()
        release.wait(20)


def test_second_runner_in_a_folder_is_refused(tmp_path):
    context = multiprocessing.get_context("fork")
    held, release = context.Event(), context.Event()
    holder = context.Process(target=hold, args=(tmp_path, held, release))
    holder.start()
    assert held.wait(20)
    with (
        pytest.raises(InputError, match=f"in use by another timm-ext process \\({holder.pid}\\)"),
        Folder(tmp_path).lock(),
    ):
        pass
    holder.kill()
    holder.join()
    with Folder(tmp_path).lock():
        pass


def test_lock_in_an_unwritable_place(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot be written"), Folder(tmp_path / "file" / "x").lock():
        pass


def test_claim_accepts_the_same_and_extended_settings(tmp_path):
    folder = Folder(tmp_path)
    folder.claim({"steps": 5, "seeds": 2, "size": (1, 2)}, extendable=["seeds"])
    folder.claim({"steps": 5, "seeds": 3, "size": (1, 2)}, extendable=["seeds"])
    assert read_json(tmp_path / PLAN) == {"format": 3, "steps": 5, "seeds": 3, "size": [1, 2]}


def test_claim_refuses_other_settings_and_foreign_folders(tmp_path):
    folder = Folder(tmp_path / "study")
    folder.claim({"steps": 5})
    with pytest.raises(InputError, match="other settings \\(steps 5 there, 6 here\\)"):
        folder.claim({"steps": 6})
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").touch()
    with pytest.raises(InputError, match=r"expected a new, empty.*got thesis\.tex"):
        Folder(foreign).claim({"steps": 5})


def test_a_study_begun_by_an_earlier_version_is_refused(tmp_path):
    (tmp_path / PLAN).write_text(json.dumps({"steps": 5}))
    with pytest.raises(InputError) as told:
        Folder(tmp_path).claim({"steps": 5})
    assert str(told.value) == (
        f"{tmp_path}: expected a study of format 3 (got format 1, of another version of timm_ext); choose "
        "another folder"
    )
    assert read_json(tmp_path / PLAN) == {"steps": 5}
