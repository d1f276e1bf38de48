import json

import pytest
import torch

from timm_ext.data.prepare import PrepareSettings
from timm_ext.data.tasks import get_task
from timm_ext.networks.io import load_network
from timm_ext.study.combination_stages import combine_and_test
from timm_ext.study.outcomes import NETWORK
from timm_ext.study.settings import to_json
from timm_ext.study.stages import make_cases, save_result, segment_and_score
from timm_ext.study.worker import Context
from timm_ext.synthesis.generate import GenerateSettings
from timm_ext.training.settings import TrainSettings
from timm_ext.transfer.start import new_network

TASK = get_task("brats")
PREPARE = PrepareSettings(spacing=8.0, size=(20, 24, 20))


def context(folder):
    folder.mkdir(parents=True, exist_ok=True)
    return Context(folder, lambda fraction: None)


@pytest.fixture(scope="module")
def settings():
    train = TrainSettings(steps=3, accelerator="cpu", tensorboard=False).to_dict()
    return {"task": "brats", "prepare": to_json(PREPARE), "train": train}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, settings):
    """One case for validation and test, and two members of other weights that took 3 and 5 steps."""
    folder = tmp_path_factory.mktemp("steps")
    generate = to_json(GenerateSettings(task="brats", spacing=8.0, size=(20, 24, 20), prefix="t"))
    make_cases({**settings, "generate": generate, "count": 1}, {}, context(folder / "cases"))
    found = {"val": folder / "cases", "test": folder / "cases"}
    for number, steps in ((1, 3), (2, 5)):
        member = context(folder / f"member-{number}").folder
        network = new_network("isensee2017", {"base_filters": 2, "levels": 3}, TASK, number)
        save_result(member / NETWORK, network, TASK, settings, ())
        (member / "record.json").write_text(
            json.dumps({"name": "run", "digest": "", "result": {"curve": [], "steps": steps}})
        )
        (member / "times.json").write_text(json.dumps({"seconds": 1.5, "validations": []}))
        found[f"member-{number}"] = member
    return found


def test_a_soup_is_saved_and_scored_as_a_run(settings, inputs, tmp_path):
    result = combine_and_test({**settings, "method": "soup"}, inputs, context(tmp_path))
    one, two, soup = (load_network(path / NETWORK)[0].state_dict() for path in (*members(inputs), tmp_path))
    for name, value in soup.items():
        torch.testing.assert_close(value, (one[name] + two[name]) / 2)
    assert result["steps"] == result["best_step"] == 8
    assert [step for step, _ in result["curve"]] == [8]
    assert json.loads((tmp_path / "times.json").read_text()) == {"seconds": 3.0, "validations": [[8, 3.0]]}
    ((case, scores),) = result["scores"].items()
    assert set(scores) == {"WT", "TC", "ET"}
    assert (tmp_path / f"predictions/{case}.nii.gz").exists()


@pytest.mark.parametrize("method", ["soup", "ensemble"])
def test_members_that_agree_score_as_one_of_them(settings, inputs, tmp_path, method):
    twins = {**inputs, "member-2": inputs["member-1"]}
    result = combine_and_test({**settings, "method": method}, twins, context(tmp_path / "all"))
    single = load_network(inputs["member-1"] / NETWORK)[0]
    alone = segment_and_score(single, inputs["test"], TASK, settings, context(tmp_path / "one").folder)
    assert {key: result[key] for key in alone} == alone


def test_an_ensemble_is_no_network(settings, inputs, tmp_path):
    soup = combine_and_test({**settings, "method": "soup"}, inputs, context(tmp_path / "soup"))
    result = combine_and_test({**settings, "method": "ensemble"}, inputs, context(tmp_path / "ensemble"))
    assert not (tmp_path / "ensemble" / NETWORK).exists()
    assert result["curve"] != soup["curve"]


def members(inputs):
    return [inputs["member-1"], inputs["member-2"]]
