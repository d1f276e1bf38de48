import pytest

from timm_ext.data.preprocess import PrepareSettings
from timm_ext.errors import InputError


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"spacing": -1.0}, r"prepare: spacing: expected lengths from 0\.001 to 1000 mm \(got -1\.0\)"),
        ({"spacing": 0.0}, "spacing: expected lengths"),
        ({"spacing": (1.0, float("nan"), 1.0)}, "spacing: expected None, a length in mm or three"),
        (
            {"spacing": (1.0, 1.0)},
            r"spacing: expected None, a length in mm or three .* \(got \(1\.0, 1\.0\)\)",
        ),
        ({"size": (10**6,) * 3}, r"size: expected a whole number from 1 to 4096"),
        ({"size": (8, 8)}, r"size: expected three numbers of voxels \(got \(8, 8\)\)"),
        ({"size": (8, 8, 0)}, r"size: expected a whole number from 1 to 4096"),
        (
            {"spacing_tolerance": 1.0},
            "tolerance: expected a finite number at least 0 and less than 1",
        ),
        ({"blur": 1}, r"prepare: unknown field blur \(expected one of nonfinite, "),
        ({"multiple": 0}, "multiple: expected a whole number from 1 to 4096"),
        ({"margin": -1}, "margin: expected a whole number from 0 to 4096"),
        ({"normalise": "minmax"}, "normalise: expected 'zscore', 'histogram' or 'none'"),
        ({"nonfinite": "drop"}, "nonfinite: expected 'error' or 'zero'"),
        ({"empty_labels": "skip"}, "empty_labels: expected 'error' or 'allow'"),
    ],
)
def test_settings_errors(change, message):
    with pytest.raises(InputError, match=message):
        PrepareSettings(**change)


def test_settings_from_lists_equal_those_from_tuples():
    assert PrepareSettings(size=[8, 8, 8], spacing=[1.0, 1.0, 2.0]) == PrepareSettings(
        size=(8, 8, 8), spacing=(1.0, 1.0, 2.0)
    )
