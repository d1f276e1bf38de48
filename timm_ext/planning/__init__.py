"""The configuration of a training, from the data and the machine: spacing, patch, batch, depth, steps."""

from timm_ext.planning.budget import Machine, free_memory, held_bytes, keep_in_memory, this_machine
from timm_ext.planning.footprint import Footprint, footprint_of
from timm_ext.planning.spacing import TargetSpacing, case_spacing, target_spacing
from timm_ext.planning.timing import step_seconds
from timm_ext.planning.training import Choice, TrainingConfiguration, configure_training, sliding_voxels

__all__ = [
    "Choice",
    "Footprint",
    "Machine",
    "TargetSpacing",
    "TrainingConfiguration",
    "case_spacing",
    "configure_training",
    "footprint_of",
    "free_memory",
    "held_bytes",
    "keep_in_memory",
    "sliding_voxels",
    "step_seconds",
    "target_spacing",
    "this_machine",
]
