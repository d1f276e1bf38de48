"""Old names of modules and of what they held, which work through one release and warn."""

import sys
import warnings
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

# Where what a module held is now; a module that was divided names several.
MOVED: dict[str, tuple[str, ...]] = {
    "_library": ("ops._library",),
    "data.anatomy": ("synthesis.anatomy",),
    "data.case_arrays": ("data.preprocess",),
    "data.dataset_json": ("data.formats.dataset_json",),
    "data.entries": ("data.formats.entries", "data.formats.brats", "data.formats.lists"),
    "data.generate": ("synthesis.generate",),
    "data.label_maps": ("synthesis.label_maps",),
    "data.layouts": ("data.formats.cases",),
    "data.phantom": ("synthesis.phantom",),
    "data.shapes": ("synthesis.shapes",),
    "data.synthesis": ("synthesis.render",),
    "data.tumour": ("synthesis.tumour",),
    "doubling_ops": ("ops.upsampled_conv3d",),
    "fisher.convolution": ("layers.convolution",),
    "fisher.fused": ("layers.fused",),
    "fisher.gradients": ("layers.gradients", "fisher.squares"),
    "fisher.nodes": ("layers.nodes", "fisher.tape"),
    "integrity": ("storage.integrity",),
    "layer_ops": ("ops.conv3d", "ops.norm"),
    "locks": ("system.locks",),
    "machine": ("system.machine",),
    "memory": ("ops.memory",),
    "merging.blocks": ("merging.streaming.blocks",),
    "merging.companions": ("merging.streaming.companions",),
    "merging.methods": ("merging.merge", "transfer.arms"),
    "merging.shards": ("merging.streaming.shards",),
    "merging.streamed": ("merging.streaming.merge",),
    "metadata": ("storage.metadata",),
    "modality_names": ("vocabulary.modalities",),
    "processes": ("system.processes",),
    "reference": ("ops.reference",),
    "region_names": ("vocabulary.regions",),
    "signals": ("system.signals",),
    "state_dicts": ("storage.state_dicts",),
    "study.sources": ("transfer.start", "transfer.sources"),
    "terminal": ("system.terminal",),
    "torch_files": ("storage.torch_files",),
    "training.losses": ("training.objective",),
    "training.run": ("training.loop",),
    "training.transfer": ("training.ties",),
}

# Names that left a module or were given another: the module that has them now, and their name in it.
MOVED_NAMES: dict[str, dict[str, tuple[str, str]]] = {
    "doubling_ops": {
        "doubled_conv3d": ("ops.upsampled_conv3d", "upsampled_conv3d"),
        "doubled_conv3d_input_gradient": ("ops.upsampled_conv3d", "upsampled_conv3d_input_gradient"),
        "doubled_conv3d_weight_grad_square_": (
            "ops.upsampled_conv3d",
            "upsampled_conv3d_weight_grad_square_",
        ),
        "nearest_doubling3d": ("ops.upsampled_conv3d", "upsample_nearest3d"),
    },
    "merging.methods": {"Method": ("transfer.arms", "Arm"), "get_method": ("transfer.arms", "get_arm")},
    "merging": {"Method": ("transfer.arms", "Arm"), "get_method": ("transfer.arms", "get_arm")},
    "ops": {
        "MIXINGS": ("ops.merge", "MIXINGS"),
        "conv_weight_grad_square_": ("ops.fisher", "conv_weight_grad_square_"),
        "fused_merge": ("ops.merge", "fused_merge"),
        "ratios": ("ops.merge", "ratios"),
        "sample_labels": ("ops.fisher", "sample_labels"),
        "square_accumulate_": ("ops.fisher", "square_accumulate_"),
    },
    "parameters": {
        name: ("layout", name) for name in ("Entry", "Layout", "check_compatible", "compatibility_report")
    },
    "training.run": {"Run": ("training.loop", "TrainingLoop")},
    "training.settings": {"AdaptSettings": ("transfer.settings", "AdaptSettings")},
}


def names_before(module: str) -> Callable[[str], Any]:
    """Return the `__getattr__` of a module that lets the names which left it work, with a warning."""

    def get(name: str) -> Any:
        moved = MOVED_NAMES[module.removeprefix("timm_ext.")]
        if name not in moved:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        place, now = moved[name]
        told = f"{module}.{name} has moved to timm_ext.{place}.{now}"
        warnings.warn(told, DeprecationWarning, stacklevel=2)
        return getattr(import_module(f"timm_ext.{place}"), now)

    return get


class _Moved(ModuleType):
    """A module that holds nothing and looks names up where they are now."""

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("__"):
            if name in MOVED_NAMES.get(self.__name__.removeprefix("timm_ext."), ()):
                return names_before(self.__name__)(name)
            for place in self.__dict__["_places"]:
                if hasattr(module := import_module(f"timm_ext.{place}"), name):
                    return getattr(module, name)
        raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")


class _Finder(MetaPathFinder, Loader):
    """Finds modules by the names that they had."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        known = fullname.startswith("timm_ext.") and fullname.removeprefix("timm_ext.") in MOVED
        return ModuleSpec(fullname, self) if known else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = _Moved(spec.name)
        module.__dict__["_places"] = MOVED[spec.name.removeprefix("timm_ext.")]
        return module

    def exec_module(self, module: ModuleType) -> None:
        places = " and ".join(f"timm_ext.{place}" for place in module.__dict__["_places"])
        warnings.warn(f"{module.__name__} has moved to {places}", DeprecationWarning, stacklevel=2)


def keep_old_names() -> None:
    """Let imports by old names find what they name; the last place that Python asks."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())
