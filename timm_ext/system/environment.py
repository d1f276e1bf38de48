"""The versions and the machine that results come from."""

import platform
from typing import Any


def environment() -> dict[str, Any]:
    """Return the versions and the machine, as JSON values for records and reports."""
    import torch

    import timm_ext

    return {
        "timm_ext": timm_ext.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}, {_processor()}",
        "instruction_set": str(timm_ext.build_info()["isa_chosen"]),
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "unknown processor"
