"""The names of image modalities, in one table for data sets and for the input channels of networks."""

import re
from collections.abc import Sequence

from timm_ext.errors import InputError

BRATS_MODALITIES = ("T1", "T1c", "T2", "FLAIR")
"""The images of a BraTS case, in the order of its task's channels."""

# Lower case, without blanks and punctuation but + and *, which have a meaning.
_SPELLINGS: dict[str, str] = {
    "t1": "t1n t1w t1wi t1weighted t1native t1nonenhanced t1nc t1wnc t1pre t1wpre pret1 t1precontrast "
    "t1wprecontrast mprage t1mprage t1wmprage",
    "t1c": "t1ce t1gd t1wc t1wce t1wgd t1km t1post t1wpost postt1 t1postcontrast t1wpostcontrast t1postgd "
    "t1contrast t1wcontrast t1contrastenhanced t1wcontrastenhanced t1cew t1cw t1gadolinium t1wgadolinium "
    "cet1 cet1w t1+ t1w+ t1+c t1c+ t1w+c t1+gd t1w+gd t1gd+ t1+contrast t1w+contrast "
    "gdt1 gdt1w t1wgdpost t1gdpost postcontrastt1 postcontrastt1w contrastt1 gadt1 t1gad",
    "t2": "t2w t2wi t2weighted",
    "flair": "fla t2f t2flair t2wflair flairt2 t2wf t2fl flairw",
    "t2star": "t2* t2*w t2stars t2starw t2sw",
    "pd": "pdw pdwi protondensity",
    "ct": "ctscan computedtomography",
}
_CANONICAL = {spelling: name for name, others in _SPELLINGS.items() for spelling in (name, *others.split())}
_FILLERS = {"mr", "mri", "3d", "2d", "tse", "fse", "se", "weighted", "image", "images", "scan", "sequence"}
_HOUNSFIELD_WORDS = {
    "ct", "cta", "ctscan", "ncct", "cect", "ldct", "hrct", "mdct", "ctpa", "ctp", "ctce", "ctc", "dect",
    "contrastct", "angioct", "ctangio", "hu", "hounsfield", "sct", "pct", "µct", "μct", "qct", "msct", "cct",
}  # fmt: skip
_NUCLEAR_WORDS = {"pet", "spect", "suv", "fdg"}


def modality_key(name: str) -> str:
    """Return the name under which a modality is known: all spellings of one have one key.

    Case, blanks and punctuation do not matter, so that T2-FLAIR, t2f and fla are `flair`, and T1-Gd, T1ce and
    T1+C are `t1c`. Nor do words that tell nothing of the contrast (MRI, 3D, TSE, weighted): 3D T1 and mr_t1
    are `t1`. A name that is in no table is its own key, without blanks and punctuation.
    """
    words = re.findall(r"[^\W_+*]+|[+*]", name.lower())
    plain, short = "".join(words), "".join(word for word in words if word not in _FILLERS)
    bare = plain.replace("+", "")
    for spelling in (plain, bare, short, short.replace("+", "")):
        if spelling in _CANONICAL:
            return _CANONICAL[spelling]
    return bare or name.strip().lower()


def distinct_keys(names: Sequence[str], where: object) -> list[str]:
    """Return the key of each name.

    Raises:
        InputError: two names mean one modality; both are named.
    """
    seen: dict[str, str] = {}
    for name in names:
        key = modality_key(name)
        if key in seen:
            raise InputError(f"{where}: expected each modality once (got {seen[key]} and {name})")
        seen[key] = name
    return list(seen)


def may_be(name: str, modality: str) -> bool:
    """Whether a name that says MRI and no more is given to an image of a modality of MRI."""
    known = {key for key in _SPELLINGS if key != "ct"}
    words = {*re.findall(r"[^\W_]+", name.lower())}
    return words <= _FILLERS and bool(words & {"mr", "mri"}) and modality_key(modality) in known


def in_hounsfield_units(name: str) -> bool:
    """Whether a modality's intensities are Hounsfield units: water is 0, air −1000, in every scan.

    CT in all its common names, synthetic (sCT) and planning CT (pCT) too, which are made in these units. Not
    cone-beam CT (CBCT), whose grey values are not calibrated, nor CT that is named with PET or SPECT.
    """
    words = set(_words(name)) | {modality_key(name)}
    return bool(words & _HOUNSFIELD_WORDS) and not words & _NUCLEAR_WORDS


def _words(name: str) -> list[str]:
    return "".join(letter if letter.isalpha() else " " for letter in name.lower()).split()
