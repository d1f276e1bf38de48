"""Correction of the slow intensity drift across a scan, by N4 (Tustison et al., IEEE TMI 2010)."""

import numpy as np
import SimpleITK as sitk  # noqa: N813 (the name its documentation uses)

from timm_ext.data.volume import Volume, from_itk, to_itk
from timm_ext.errors import InputError

_LONGEST = 64
"""The field is smooth: it is estimated on an image shrunk to at most this many voxels per axis."""


def correct_bias(volume: Volume, where: object) -> Volume:
    """Divide an image `[D, H, W]` by its bias field; zeros stay zeros.

    The field is estimated by SimpleITK's N4 over the positive voxels of a shrunken copy, on one thread so
    that the result does not depend on their number, and evaluated on the full grid.

    Raises:
        InputError: too few positive voxels, or too few along an axis, to estimate a field.
    """
    image = to_itk(Volume(volume.data.astype(np.float32), volume.affine))
    factors = [max(1, -(-length // _LONGEST)) for length in volume.shape]
    small = sitk.Shrink(image, factors)
    mask = sitk.Cast(small > 0, sitk.sitkUInt8)
    n4 = sitk.N4BiasFieldCorrectionImageFilter()
    n4.SetNumberOfThreads(1)
    try:
        n4.Execute(small, mask)
        field = from_itk(n4.GetLogBiasFieldAsImage(image))
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        raise InputError(f"{where}: the bias field cannot be estimated ({reason})") from error
    return Volume((volume.data * np.exp(-field)).astype(np.float32), volume.affine)
