"""The fourteen structures of the parcellation (Geyer et al. 2019): numbers, names and FreeSurfer's codes."""

from typing import NamedTuple


class Structure(NamedTuple):
    """A structure of the brain.

    Attributes:
        name: what the parcellation calls it.
        codes: numbers of FreeSurfer (aseg, aparc+aseg, SynthSeg) that belong to it.
        synonyms: further names of it.
        parts: names of structures that are counted to it, but that are not it.
    """

    name: str
    codes: tuple[int, ...]
    synonyms: tuple[str, ...] = ()
    parts: tuple[str, ...] = ()


STRUCTURES: dict[int, Structure] = {
    1: Structure("cerebellum grey matter", (8, 47), ("cerebellum cortex",)),
    2: Structure(
        "cerebral grey matter",
        (3, 42, 26, 58, *range(1000, 3000), *range(11100, 13000)),
        ("cerebral cortex", "cortex", "cortical gray matter", "gray matter", "ctx", "isocortex", "neocortex"),
        ("accumbens", "accumbens area", "nucleus accumbens"),
    ),
    3: Structure("thalamus", (10, 49), ("thalamus proper", "thalami")),
    4: Structure("amygdala", (18, 54, 31, 63, 136, 137, 163, 164), ("amygdalae",), ("choroid plexus",)),
    5: Structure("caudate", (11, 50), ("caudate nucleus", "nucleus caudatus")),
    6: Structure("pallidum", (13, 52), ("globus pallidus",)),
    7: Structure("CSF", (24,), ("cerebrospinal fluid",)),
    8: Structure("cerebellum white matter", (7, 46)),
    9: Structure(
        "cerebral white matter",
        (2, 41, 77, 78, 79, *range(251, 256), 25, 57),
        ("white matter", "subcortical white matter"),
    ),
    10: Structure("hippocampus", (17, 53), ("hippocampi",)),
    11: Structure(
        "ventricle",
        (4, 5, 43, 44, 14, 15, 72),
        parts=(
            *("lateral ventricle", "inf lat vent", "inferior lateral ventricle"),
            *("3rd ventricle", "third ventricle", "4th ventricle", "fourth ventricle"),
            *("5th ventricle", "fifth ventricle"),
        ),
    ),
    12: Structure("putamen", (12, 51), ("putamina",)),
    13: Structure("ventral DC", (28, 60), ("ventraldc", "ventral diencephalon")),
    14: Structure("brainstem", (16,), ("brain stem",)),
}
"""The structures by their class number."""

FREESURFER_TO_CLASS: dict[int, int] = {
    code: number for number, structure in STRUCTURES.items() for code in structure.codes
}
"""Class number of every FreeSurfer label that belongs to one; all other labels are background."""
