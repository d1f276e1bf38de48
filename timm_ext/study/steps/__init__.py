"""The steps of a study; `STEPS` is all that a record or a worker process may hold."""

from timm_ext.study.step import Step
from timm_ext.study.steps.crops import CropHeads
from timm_ext.study.steps.data import MakeCases, PreparePool, TakeCases
from timm_ext.study.steps.runs import Adapt, CombineAndTest, TuneAndTest
from timm_ext.study.steps.sources import EstimateFisher, ScoreMerges, TrainSource

STEPS: tuple[type[Step], ...] = (
    MakeCases,
    PreparePool,
    TakeCases,
    CropHeads,
    TrainSource,
    EstimateFisher,
    Adapt,
    TuneAndTest,
    CombineAndTest,
    ScoreMerges,
)
"""All types of steps, in the order of the work."""
