"""Imports inside the package go one way; the table is the layering of the design."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import timm_ext

PACKAGE = Path(timm_ext.__file__).parent

BASE = {"_moved", "errors", "files", "system", "documents", "vocabulary"}
MODEL = {"modes", "parameters", "layout", "groups", "storage", "checkpoint", "networks"}
MERGE = {"ops", "layers", "fisher", "merging"}
WORK = {"data", "training", "inference", "metrics"}

# What each module or package of timm_ext may import from timm_ext. A name may always import itself.
ALLOWED = {
    "__init__": BASE | {"_moved", "ops"},
    "__main__": {"cli"},
    "_moved": set(),
    "errors": set(),
    "files": {"errors"},
    "system": {"errors", "files"},
    "documents": {"errors", "files"},
    "vocabulary": {"errors"},
    "modes": set(),
    "ops": {"_moved", "errors"},
    "layers": {"errors", "ops"},
    "parameters": BASE,
    "layout": BASE | {"parameters"},
    "groups": BASE | {"parameters", "layout"},
    "storage": BASE,
    "checkpoint": BASE | {"storage"},
    "networks": BASE | {"modes", "parameters", "layout", "storage", "checkpoint"},
    "fisher": BASE | {"ops", "layers", "modes", "parameters", "checkpoint"},
    "merging": BASE | {"ops", "fisher"} | MODEL,
    "data": BASE,
    "synthesis": BASE | {"data"},
    "metrics": BASE | {"data"},
    "inference": BASE | {"data", "layers", "modes", "networks"},
    "training": BASE | MODEL | MERGE | WORK,
    "transfer": BASE | MODEL | MERGE | WORK,
    "interop": BASE | MODEL | {"data", "inference", "layers"},
    "planning": BASE | {"data", "inference", "layers", "networks"},
    "study": BASE | MODEL | MERGE | WORK | {"synthesis", "transfer", "planning"},
    "config": BASE | {"data", "fisher", "inference", "training", "transfer"},
    "cli": BASE | MODEL | MERGE | WORK | {"synthesis", "transfer", "interop", "config", "planning", "study"},
}

# Packages that `import timm_ext` must not load, and the modules that may import them at their top.
HEAVY = {
    "monai",
    "nibabel",
    "SimpleITK",
    "scipy",
    "matplotlib",
    "pandas",
    "jinja2",
    "pydantic",
    "lightning_fabric",
    "typer",
    "rich",
}
LIGHT = {
    "__init__",
    "_moved",
    "errors",
    "files",
    "system",
    "vocabulary",
    "ops",
    "layers",
    "modes",
    "parameters",
    "layout",
    "groups",
}

MODULES = sorted(path.relative_to(PACKAGE).with_suffix("") for path in PACKAGE.rglob("*.py"))
every_module = pytest.mark.parametrize("module", MODULES, ids=str)


def unit_of(module: Path) -> str:
    """The module or package right below timm_ext that a file belongs to."""
    return module.parts[0]


def imported_names(module: Path, *, top_level: bool = False) -> Iterator[str]:
    """Yield the dotted names of the import statements of a file."""
    yield from names_in((PACKAGE / module).with_suffix(".py").read_text(), module, top_level=top_level)


def names_in(text: str, module: Path, *, top_level: bool = False) -> Iterator[str]:
    """Yield the dotted names that the text of a module imports."""
    tree = ast.parse(text)
    for node in tree.body if top_level else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level > 0:
                base = ".".join(["timm_ext", *module.parts[: len(module.parts) - node.level]])
                if node.module:
                    yield f"{base}.{node.module}"
                else:
                    yield from (f"{base}.{alias.name}" for alias in node.names)
            elif node.module == "timm_ext":
                yield from (f"timm_ext.{alias.name}" for alias in node.names)
            else:
                yield str(node.module)


def own_units(module: Path) -> set[str]:
    names = (name.split(".") for name in imported_names(module))
    return {parts[1] for parts in names if parts[0] == "timm_ext" and len(parts) > 1}


@pytest.mark.parametrize(
    "text",
    [
        "import timm_ext.study",
        "import timm_ext.study.plan as plan",
        "from timm_ext import study",
        "from timm_ext.study import plan",
        "from .. import study",
        "from ..study.plan import StudyPlan",
        "def late():\n    from .. import study",
    ],
)
def test_every_way_to_import_is_seen(text: str) -> None:
    assert {name.split(".")[1] for name in names_in(text, Path("transfer/tune"))} == {"study"}


@every_module
def test_imports_go_one_way(module: Path) -> None:
    unit = unit_of(module)
    assert unit in ALLOWED, f"{unit}: give it a place in the table"
    lazy = set(timm_ext._MODULE_OF.values()) if unit == "__init__" else set()  # loaded when they are used
    beyond = own_units(module) - ALLOWED[unit] - {unit} - lazy
    assert not beyond, f"{module} imports {', '.join(sorted(beyond))}"


STUDIES = {Path("cli/study"), Path("cli/demo")}


@pytest.mark.parametrize("module", [m for m in MODULES if unit_of(m) == "cli"], ids=str)
def test_only_studies_import_studies(module: Path) -> None:
    """Merging, adapting and training by commands need no study."""
    assert module in STUDIES or "study" not in own_units(module)


@every_module
def test_light_modules_import_nothing_heavy(module: Path) -> None:
    if unit_of(module) in LIGHT and module.name != "terminal":
        heavy = {name.split(".")[0] for name in imported_names(module)} & HEAVY
        assert not heavy, f"{module} imports {', '.join(sorted(heavy))}"


@pytest.mark.parametrize("module", [m for m in MODULES if unit_of(m) == "cli"], ids=str)
def test_commands_import_heavy_packages_inside(module: Path) -> None:
    """So that `timm-ext --help` and a mistyped option answer at once."""
    light = {"typer", "rich"}
    heavy = ({name.split(".")[0] for name in imported_names(module, top_level=True)} & HEAVY) - light
    assert not heavy, f"{module} imports {', '.join(sorted(heavy))} at its top"


def test_the_layers_have_no_cycle() -> None:
    """The table itself goes one way."""
    left = {unit: allowed - {unit} for unit, allowed in ALLOWED.items() if unit != "__init__"}
    while left:
        free = {unit for unit, allowed in left.items() if not allowed & left.keys()}
        assert free, f"cycle among {sorted(left)}"
        left = {unit: allowed for unit, allowed in left.items() if unit not in free}


def test_no_operator_is_computed_by_its_twin() -> None:
    """`ops/reference.py` is for tests and benchmarks, and takes nothing from the package."""
    twins = Path("ops/reference")
    assert not own_units(twins)
    for module in set(MODULES) - {twins}:
        code = ast.walk(ast.parse((PACKAGE / module).with_suffix(".py").read_text()))
        taken = {alias.name for node in code if isinstance(node, ast.ImportFrom) for alias in node.names}
        assert "reference" not in taken, module
        assert "timm_ext.ops.reference" not in imported_names(module), module


def test_only_the_operators_reach_the_library() -> None:
    reaching = {
        unit_of(m) for m in MODULES if "torch.ops.timm_ext" in (PACKAGE / m).with_suffix(".py").read_text()
    }
    assert reaching == {"ops"}


def test_only_the_report_loads_pandas_and_jinja2() -> None:
    loading = {
        m.parts[:2] for m in MODULES if {n.split(".")[0] for n in imported_names(m)} & {"pandas", "jinja2"}
    }
    assert loading == {("study", "report")}
