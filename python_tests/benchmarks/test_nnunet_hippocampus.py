"""The cases of a benchmark with nnU-Net: none is trained on that is scored."""

from argparse import Namespace

from benchmarks import nnunet_hippocampus


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


def test_plans_are_made_smaller():
    configuration = {"batch_size": 9, "architecture": {"arch_kwargs": {"features_per_stage": [32, 64, 128]}}}
    nnunet_hippocampus.shrink(configuration, Namespace(batch=2, features=8))
    assert configuration == {
        "batch_size": 2,
        "architecture": {"arch_kwargs": {"features_per_stage": [8, 16, 32]}},
    }
