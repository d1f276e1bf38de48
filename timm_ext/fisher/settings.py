"""Settings of an estimate of the Fisher information."""

from typing import Literal

from pydantic import BaseModel, ConfigDict

from timm_ext.documents.fields import Batch, Cases, Flag, Seed


class EstimateSettings(BaseModel):
    """Arguments of `estimate_fisher`.

    Attributes:
        likelihood: what the outputs mean.
        labels: drawn from the model's own output, or those of the label files (the empirical Fisher).
        samples: label draws per example.
        seed: of the draws.
        batch_size: examples per pass, of one size where more than one; does not change the result.
        strict: refuse frozen and tied parameters.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    likelihood: Literal["bernoulli", "categorical", "dice"] = "bernoulli"
    labels: Literal["sampled", "true"] = "sampled"
    samples: Cases = 1
    seed: Seed = 0
    batch_size: Batch = 1
    strict: Flag = True
