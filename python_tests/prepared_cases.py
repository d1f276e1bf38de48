"""Small cases on disk for tests of preparation."""

import nibabel as nib
import numpy as np

from timm_ext.data.formats.cases import Case
from timm_ext.data.tasks import task_from_dict

TASK = task_from_dict(
    {
        "name": "pair",
        "modalities": ["T1", "T2"],
        "regions": {"both": [1, 2, 4], "core": [1, 4]},
        "labels": [0, 1, 2, 4],
    }
)
SHAPE = (13, 11, 9)


def oriented(codes, tilt_degrees=0.0, spacing=(1.0, 1.5, 2.0)):
    """The affine of a grid of SHAPE whose axes run as the codes say, tilted about the vertical axis."""
    cosine, sine = np.cos(np.deg2rad(tilt_degrees)), np.sin(np.deg2rad(tilt_degrees))
    tilt = np.array([[cosine, -sine, 0, 3], [sine, cosine, 0, -5], [0, 0, 1, 8], [0, 0, 0, 1]])
    axes = nib.orientations.axcodes2ornt(codes)
    return tilt @ nib.orientations.inv_ornt_aff(axes, SHAPE) @ np.diag([*spacing, 1])


def make_case(folder, name="a", *, affine=None, change=None):
    """A case with foreground in an uneven box, negative intensities, and labels 0, 1, 2, 4 inside it."""
    folder.mkdir(parents=True, exist_ok=True)
    affine = np.eye(4) if affine is None else affine
    generator = np.random.default_rng(5)
    inside = np.zeros(SHAPE, dtype=bool)
    inside[2:12, 0:8, 3:8] = True
    arrays = {
        key: np.where(inside, generator.integers(-3, 90, SHAPE), 0).astype(np.int16) for key in ("T1", "T2")
    }
    for array in arrays.values():
        array[2, 0, 3] = array[11, 7, 7] = 50
    arrays["label"] = np.where(inside, generator.choice([0, 1, 2, 4], SHAPE), 0).astype(np.uint8)
    files = {}
    for key, array in (change(arrays) or arrays if change else arrays).items():
        files[key] = folder / f"{name}_{key}.nii.gz"
        nib.save(nib.Nifti1Image(array, affine), files[key])
    return Case(name, {key: files[key] for key in ("T1", "T2")}, files.get("label"))


def rewrite(path, *, affine=None, data=None):
    image = nib.load(path)
    array = np.asanyarray(image.dataobj) if data is None else data
    nib.save(nib.Nifti1Image(array, image.affine if affine is None else affine), path)
