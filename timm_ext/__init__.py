"""Fisher-weighted adaptive merging of pre-trained 3D segmentation networks into one initialisation.

Importing the package loads torch and the operators only; the other names below load their module when they
are used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from timm_ext.system.signals import quiet_start

quiet_start()  # torch takes seconds to load, in which Ctrl-C must not print a traceback

from timm_ext._moved import keep_old_names  # noqa: E402
from timm_ext.errors import InputError  # noqa: E402
from timm_ext.ops._library import build_info, load_library  # noqa: E402

__version__ = "0.1.0"
load_library(__path__, __version__)
keep_old_names()

from timm_ext.ops.fisher import (  # noqa: E402
    conv_weight_grad_square_,
    sample_labels,
    square_accumulate_,
)
from timm_ext.ops.merge import (  # noqa: E402
    fused_merge,
    ratios,
)

if TYPE_CHECKING:
    from timm_ext.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
    from timm_ext.fisher import Fisher, FisherAccumulator, estimate_fisher
    from timm_ext.groups import Groups, make_groups
    from timm_ext.layers import fast_layers
    from timm_ext.layout import Layout
    from timm_ext.merging import Bank, MergedModel
    from timm_ext.networks import build_network
    from timm_ext.parameters import split_parameters

_MODULE_OF = {
    "Bank": "merging",
    "Checkpoint": "checkpoint",
    "Fisher": "fisher",
    "FisherAccumulator": "fisher",
    "Groups": "groups",
    "Layout": "layout",
    "MergedModel": "merging",
    "build_network": "networks",
    "estimate_fisher": "fisher",
    "fast_layers": "layers",
    "load_checkpoint": "checkpoint",
    "make_groups": "groups",
    "save_checkpoint": "checkpoint",
    "split_parameters": "parameters",
}

__all__ = [
    "Bank",
    "Checkpoint",
    "Fisher",
    "FisherAccumulator",
    "Groups",
    "InputError",
    "Layout",
    "MergedModel",
    "__version__",
    "build_info",
    "build_network",
    "conv_weight_grad_square_",
    "estimate_fisher",
    "fast_layers",
    "fused_merge",
    "load_checkpoint",
    "make_groups",
    "ratios",
    "sample_labels",
    "save_checkpoint",
    "split_parameters",
    "square_accumulate_",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'timm_ext' has no attribute {name!r}")
    return getattr(import_module(f"timm_ext.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
