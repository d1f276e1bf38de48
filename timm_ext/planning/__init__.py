"""Plans of a training made from the data and the machine: spacing, patch, batch, depth, steps."""

from timm_ext.planning.budget import Machine, free_memory, held_bytes, keep_in_memory, this_machine
from timm_ext.planning.footprint import Footprint, footprint_of
from timm_ext.planning.spacing import SpacingPlan, case_spacing, plan_spacing
from timm_ext.planning.timing import step_seconds
from timm_ext.planning.training import Choice, TrainingPlan, plan_training, sliding_voxels

__all__ = [
    "Choice",
    "Footprint",
    "Machine",
    "SpacingPlan",
    "TrainingPlan",
    "case_spacing",
    "footprint_of",
    "free_memory",
    "held_bytes",
    "keep_in_memory",
    "plan_spacing",
    "plan_training",
    "sliding_voxels",
    "step_seconds",
    "this_machine",
]
