"""The cases of a benchmark with nnU-Net: none is trained on that is scored."""

import json
from argparse import Namespace

from benchmarks import nnunet_hippocampus
from benchmarks.pages.tables import RESULTS

RESULT = RESULTS / "nnunet_hippocampus.json"


def test_cases_are_parted(tmp_path):
    (tmp_path / "labelsTr").mkdir()
    names = [f"case_{number}" for number in range(20)]
    for name in names:
        (tmp_path / "labelsTr" / f"{name}.nii.gz").touch()
    options = Namespace(data=tmp_path, test=4, target=3, seed=0)
    parts = nnunet_hippocampus.parts(options)
    assert [len(part) for part in parts] == [4, 3, 6, 7]
    assert sorted(name for part in parts for name in part) == sorted(names)
    assert parts == nnunet_hippocampus.parts(options)
    assert parts != nnunet_hippocampus.parts(Namespace(**{**vars(options), "seed": 1}))


def test_some_cases_become_a_data_set_of_their_own(tmp_path):
    for folder, suffix in (("imagesTr", "_0000"), ("labelsTr", "")):
        (tmp_path / "all" / folder).mkdir(parents=True)
        for name in "abc":
            (tmp_path / "all" / folder / f"{name}{suffix}.nii.gz").write_text(name, encoding="utf-8")
    (tmp_path / "all" / "dataset.json").write_text(
        '{"numTraining": 3, "file_ending": ".nii.gz"}', encoding="utf-8"
    )
    for _ in range(2):  # a second time it finds its links
        out = nnunet_hippocampus.linked(tmp_path / "all", ["a", "c"], tmp_path / "some")
    found = {path.relative_to(out).as_posix(): path.read_text(encoding="utf-8") for path in out.rglob("*.gz")}
    assert found == {f"imagesTr/{n}_0000.nii.gz": n for n in "ac"} | {f"labelsTr/{n}.nii.gz": n for n in "ac"}
    assert json.loads((out / "dataset.json").read_text(encoding="utf-8"))["numTraining"] == 2


def test_repeats_of_a_network_are_rows_of_one_stage(monkeypatch, tmp_path):
    monkeypatch.setattr(nnunet_hippocampus, "train", lambda options, arm, *_: tmp_path / arm)
    monkeypatch.setattr(nnunet_hippocampus, "merged", lambda *_: (tmp_path, tmp_path))
    made = list(nnunet_hippocampus.networks(Namespace(work=tmp_path, epochs=1, repeats=2)))
    keys = [key for *key, _, _ in made]
    assert len({tuple(key) for key in keys}) == len(keys) == 6 + 2 * 6
    assert [repeat for name, stage, repeat in keys if (name, stage) == ("scratch", "continued")] == [0, 1]
    committed = json.loads(RESULT.read_text(encoding="utf-8"))["rows"]
    assert [[row["network"], row["stage"], row["repeat"]] for row in committed] == keys


def test_plans_are_made_smaller():
    configuration = {"batch_size": 9, "architecture": {"arch_kwargs": {"features_per_stage": [32, 64, 128]}}}
    nnunet_hippocampus.shrink(configuration, Namespace(batch=2, features=8))
    assert configuration == {
        "batch_size": 2,
        "architecture": {"arch_kwargs": {"features_per_stage": [8, 16, 32]}},
    }
