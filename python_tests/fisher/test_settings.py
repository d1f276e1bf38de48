from inspect import signature

import pytest

from timm_ext.config import FisherSettings
from timm_ext.documents import validated
from timm_ext.errors import InputError
from timm_ext.fisher import FisherAccumulator, estimate_fisher
from timm_ext.fisher.settings import EstimateSettings
from timm_ext.study.plan import FisherOptions


def test_the_defaults_are_those_of_the_functions():
    parameters = {**signature(FisherAccumulator).parameters, **signature(estimate_fisher).parameters}
    assert EstimateSettings().model_dump() == {
        name: parameters[name].default for name in EstimateSettings.model_fields
    }
    assert parameters["precision"].default == FisherOptions().precision


@pytest.mark.parametrize("kind", [FisherSettings, FisherOptions])
def test_commands_and_studies_take_the_same_values(kind):
    assert EstimateSettings.model_fields.keys() <= kind.model_fields.keys()
    assert validated(kind, {"likelihood": "dice", "samples": 3}, "fisher").samples == 3
    for wrong in ({"likelihood": "gauss"}, {"samples": 0}, {"seed": -1}, {"batch_size": 0}, {"more": 1}):
        with pytest.raises(InputError, match=next(iter(wrong))):
            validated(kind, wrong, "fisher")
