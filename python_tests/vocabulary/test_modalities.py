import pytest

from timm_ext.errors import InputError
from timm_ext.vocabulary.modalities import distinct_keys, in_hounsfield_units, may_be, modality_key


@pytest.mark.parametrize(
    ("key", "names"),
    {
        "t1": ["T1", "t1n", "T1w", "T1-w", "T1 weighted", "T1_pre", "MPRAGE", "T1-",
               "3D T1", "MRI T1", "mr_t1", "T1w images"],
        "t1c": ["T1c", "T1CE", "t1-ce", "T1Gd", "T1-Gd", "T1 post",
                "T1+C", "T1+", "T1w+Gd", "T1 Contrast Enhanced",
                "T1-weighted post-contrast", "Gd-T1", "3D T1 Gd"],
        "t2": ["T2", "t2w", "T2-w", " T2 ", "T2 TSE"],
        "flair": ["FLAIR", "fla", "t2f", "T2-FLAIR", "T2 FLAIR", "Flair", "3D T2-FLAIR"],
        "t2star": ["T2*", "T2* w", "t2star", "T2*-weighted"],
        "ct": ["CT", "ct", "Computed Tomography"],
    }.items(),
)  # fmt: skip
def test_spellings_of_one_modality(key, names):
    assert {modality_key(name) for name in names} == {key}


def test_other_names_are_compared_by_their_letters():
    assert modality_key("b = 1000") == modality_key("B1000") != modality_key("b0")
    assert modality_key("ADC") == "adc"
    assert modality_key("++") != modality_key("--")


def test_two_names_of_one_modality_are_both_told():
    assert distinct_keys(["T1", "T2-FLAIR"], "task") == ["t1", "flair"]
    with pytest.raises(InputError, match=r"task: expected each modality once \(got T2-FLAIR and fla\)"):
        distinct_keys(["T1", "T2-FLAIR", "fla"], "task")


@pytest.mark.parametrize("name", ["MRI", "mr", "3D MRI", "MR image", "mri_scan", "2D-MR TSE"])
def test_a_name_that_says_mri_and_no_more_may_be_any_of_its_modalities(name):
    assert may_be(name, "T1")
    assert may_be(name, "T2-FLAIR")
    assert not may_be(name, "CT")


@pytest.mark.parametrize("name", ["image", "scan", "3D", "weighted", "MRI T1", "MRI 7T", "CT", "mrx", ""])
def test_a_name_that_says_less_or_more_than_mri_may_not(name):
    assert not may_be(name, "T1")


def test_hounsfield_units():
    assert all(
        map(in_hounsfield_units, ["CT", "ct", "CT-1", "CT venous", "NCCT", "CTA", "Computed Tomography"])
    )
    others = "MDCT CTPA CTP CECT CTce CTC contrastCT AngioCT µCT HU DECT sCT pCT"
    assert all(map(in_hounsfield_units, others.split()))
    assert not any(
        map(
            in_hounsfield_units,
            ["T1", "MRI", "PET", "PET/CT", "PET-CT", "SPECT", "octant", "ADC", "CBCT", "ACT"],
        )
    )
