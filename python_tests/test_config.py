import pytest

from timm_ext.config import RunSettings, load_settings, settings_to_dict, write_settings
from timm_ext.errors import InputError


def load(tmp_path, text, *overrides, **options):
    path = tmp_path / "settings.yaml"
    path.write_text(text)
    return load_settings(RunSettings, path, overrides, **options)


def test_defaults_are_the_dataclasses_own():
    settings = load_settings(RunSettings)
    assert settings.train.lr == 5e-4
    assert settings.network.name == "isensee2017"
    assert settings.prepare.normalise == "zscore"


def test_file_then_overrides(tmp_path):
    settings = load(tmp_path, "train: {lr: 0.01, steps: 5}\nmerge:\n  granularity: kernel\n", "train.lr=3e-3")
    assert (settings.train.lr, settings.train.steps, settings.merge.granularity) == (0.003, 5, "kernel")


def test_an_empty_file_is_the_defaults(tmp_path):
    assert load(tmp_path, "") == RunSettings()


def test_base_holds_only_where_nothing_else_is_said(tmp_path):
    base = {"prepare": {"spacing": 4.0, "crop": False}}
    settings = load(tmp_path, "prepare: {spacing: 2}\n", base=base)
    assert (settings.prepare.spacing, settings.prepare.crop) == (2.0, False)


def test_settings_are_frozen():
    with pytest.raises(ValueError, match="frozen"):
        RunSettings().train = None


def test_written_settings_are_read_back(tmp_path):
    settings = load(tmp_path, "prepare: {size: [8, 16, 24]}\npredict: {window: [8, 8, 8]}\n")
    path = tmp_path / "effective.yaml"
    write_settings(path, settings, command="timm-ext train", odd="a\nb\ud800")
    assert path.read_text().startswith("# command: timm-ext train\n# odd: a\\nb\\ud800\n")
    assert load_settings(RunSettings, path) == settings
    assert settings_to_dict(settings)["prepare"]["size"] == [8, 16, 24]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "trian:\n  lr: 1\n",
            r"settings\.yaml, line 1: unknown field trian \(expected one of network, prepare",
        ),
        (
            "train:\n  lr: 1\n  stepz: 4\n",
            r"line 3: unknown field train\.stepz \(expected one of steps, epochs",
        ),
        ("merge:\n  ratio: 1\n", r"line 2: unknown field merge\.ratio \(expected one of granularity"),
        (
            "train:\n  steps: many\n",
            r"line 2: train\.steps: expected a whole number from 1 to \d+ \(got 'many'\)",
        ),
        ("train:\n\n  lr: -1\n", r"line 3: train\.lr: expected a finite number greater than 0 \(got -1\)"),
        ("fisher:\n  labels: guessed\n", r"line 2: fisher\.labels: .*'sampled' or 'true'.*\(got 'guessed'\)"),
        ("predict:\n  overlap: 1.5\n", r"line 2: predict\.overlap: .*less than 1 \(got 1\.5\)"),
        ("- a\n", r"expected sections with fields \(got list\)"),
        ("train: [1\n", "expected YAML"),
        ("train: 3\n", "line 1: train: "),
    ],
)
def test_bad_file(tmp_path, text, message):
    with pytest.raises(InputError, match=message) as caught:
        load(tmp_path, text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.stepz=4", r"--set: unknown field train\.stepz"),
        (
            "adapt.steps=3",
            r"--set: unknown field adapt\.steps \(expected one of [^;]*; there is train\.steps\)$",
        ),
        ("train", "--set: expected section.field=value"),
        ("train.lr.more=4", "--set"),
        ("train.lr=[1", "--set train.lr: expected YAML of plain values"),
        ("train.lr=slow", r"--set: train\.lr: "),
    ],
)
def test_bad_override(override, message):
    with pytest.raises(InputError, match=message):
        load_settings(RunSettings, None, [override])


def test_missing_file(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        load_settings(RunSettings, tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.patch=32", r"train\.patch: expected auto, whole or three edges .*64\] \(got 32\)"),
        ("train.patch=[32, 32]", r"train\.patch: expected auto, whole or three edges .*\(got \[32, 32\]\)"),
        ("fisher.patch=all", r"fisher\.patch: expected auto, whole or three edges .*\(got 'all'\)"),
        ("predict.window=32", r"predict\.window: expected auto, whole or three edges .*\(got 32\)"),
        ("prepare.size=32", r"prepare\.size: expected null or three edges .*\(got 32\)"),
        ("prepare.spacing=fine", r"prepare\.spacing: expected auto, scan, a length in mm or three .*'fine'"),
    ],
)
def test_settings_of_several_forms_name_them(override, expected):
    with pytest.raises(InputError, match=expected):
        load_settings(RunSettings, None, [override])


def test_a_field_that_has_moved_is_read_where_it_was(tmp_path):
    assert load_settings(RunSettings, None, ["train.head=fitted"]).merge.head == "fitted"
    both = load(tmp_path, "train: {head: fitted, steps: 3}\nmerge: {seed: 2}\n")
    assert (both.merge.head, both.merge.seed, both.train.steps) == ("fitted", 2, 3)
    assert load(tmp_path, "train: {head: fitted}\n", "merge.head=given").merge.head == "given"
    with pytest.raises(InputError, match=r"settings\.yaml, line 2: merge\.head: expected 'given'"):
        load(tmp_path, "train:\n  head: tight\n")


def test_what_yaml_takes_for_a_text_may_be_a_number():
    settings = load_settings(RunSettings, None, ["train.lr=1e-3", "merge.align=yes", "train.steps='100'"])
    assert (settings.train.lr, settings.merge.align, settings.train.steps) == (1e-3, True, 100)
