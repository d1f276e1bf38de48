import json
from pathlib import Path

import numpy as np
import pytest

from timm_ext.data.noise import keyed_generator
from timm_ext.synthesis.anatomy import BOX_MM, BOX_SD_MM, MEASURED, individual

FACTS = Path(__file__).parents[3] / "shared" / "data" / "anatomy_facts.json"


@pytest.mark.skipif(not FACTS.is_file(), reason="the measured facts are not here")
def test_the_numbers_are_those_that_were_measured():
    facts = json.loads(FACTS.read_text())
    np.testing.assert_allclose(BOX_MM, facts["brain_box_mm_RAS"]["mean"])
    np.testing.assert_allclose(BOX_SD_MM, facts["brain_box_mm_RAS"]["sd"])
    assert len(MEASURED) == len(facts["structures"])
    for structure, fact in zip(MEASURED.values(), facts["structures"].values(), strict=True):
        assert (len(structure.codes) == 2) == (fact["side"] == "left")
        volume = (structure.volume_ml, structure.volume_sd_ml)
        np.testing.assert_allclose(volume, fact["volume_ml"], rtol=0.02)
        assert structure.centroid_sd_mm == tuple(fact["centroid_sd_mm"])


def test_people_differ_around_the_measured_means():
    people = [individual(keyed_generator(seed)) for seed in range(200)]
    for name, structure in MEASURED.items():
        volumes = np.array([person.volume_ml[name][0] for person in people])
        assert abs(volumes.mean() - structure.volume_ml) < 0.3 * structure.volume_sd_ml
        assert 0.6 < volumes.std() / structure.volume_sd_ml < 1.2
        assert volumes.min() > 0
    boxes = np.array([person.box_mm for person in people])
    assert np.all(np.abs(boxes.mean(axis=0) - BOX_MM) < 0.3 * np.array(BOX_SD_MM))


def test_the_sides_of_one_person_are_alike():
    person = individual(keyed_generator(3))
    left, right = person.volume_ml["thalamus"]
    assert left != right
    assert abs(left / right - 1) < 0.2
    assert len(person.volume_ml["brainstem"]) == 1


def test_large_brains_have_large_structures():
    people = [individual(keyed_generator(seed)) for seed in range(100)]
    cortex, thalamus = ([p.volume_ml[name][0] for p in people] for name in ("cerebral cortex", "thalamus"))
    assert np.corrcoef(cortex, thalamus)[0, 1] > 0.2
