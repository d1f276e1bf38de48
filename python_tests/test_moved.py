"""Names that modules had before work, warn, and give the same objects."""

import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec

import pytest

import timm_ext
from timm_ext._moved import MOVED, MOVED_NAMES


@pytest.mark.parametrize("old", MOVED)
def test_an_old_name_leads_to_what_is_there_now(old: str) -> None:
    sys.modules.pop(f"timm_ext.{old}", None)
    with pytest.warns(DeprecationWarning, match=f"timm_ext.{old} has moved to timm_ext.{MOVED[old][0]}"):
        module = import_module(f"timm_ext.{old}")
    for place in MOVED[old]:
        now = import_module(f"timm_ext.{place}")
        for name in vars(now):
            if not name.startswith("_"):
                assert hasattr(module, name)
        assert find_spec(f"timm_ext.{place}").origin is not None


def test_what_was_never_there_is_missing() -> None:
    with pytest.raises(ModuleNotFoundError, match=r"timm_ext\.nothing"):
        import_module("timm_ext.nothing")
    moved = import_module("timm_ext.reference")
    with pytest.raises(AttributeError, match=r"'timm_ext\.reference' has no attribute 'nothing'"):
        _ = moved.nothing


@pytest.mark.parametrize(
    ("module", "name"), [(m, name) for m, names in MOVED_NAMES.items() for name in names]
)
def test_a_name_that_left_a_module_is_found_from_there(module: str, name: str) -> None:
    place, now = MOVED_NAMES[module][name]
    with pytest.warns(
        DeprecationWarning, match=f"timm_ext.{module}.{name} has moved to timm_ext.{place}.{now}"
    ):
        found = getattr(import_module(f"timm_ext.{module}"), name)
    assert found is getattr(import_module(f"timm_ext.{place}"), now)


def test_a_name_that_a_module_never_had_is_missing() -> None:
    with pytest.raises(AttributeError, match=r"'timm_ext\.ops' has no attribute 'nothing'"):
        _ = timm_ext.ops.nothing


def test_the_warning_names_the_line_that_imports(tmp_path) -> None:
    script = tmp_path / "script.py"
    script.write_text("import timm_ext\nfrom timm_ext.reference import fused_merge\n")
    run = subprocess.run([sys.executable, "-W", "default", script], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert f"{script}:2: DeprecationWarning: timm_ext.reference has moved to timm_ext.ops" in run.stderr
