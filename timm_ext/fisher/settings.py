"""Settings of an estimate of the Fisher information."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from timm_ext.documents.fields import Batch, Cases, Flag, Seed
from timm_ext.errors import InputError

Likelihood = Literal["auto", "bernoulli", "categorical", "dice"]


class EstimateSettings(BaseModel):
    """Arguments of `estimate_fisher`.

    Attributes:
        likelihood: what the outputs mean; `auto` as the task has it: `categorical` for classes of a softmax,
            `bernoulli` for regions.
        labels: drawn from the model's own output, or those of the label files (the empirical Fisher).
        samples: label draws per example.
        seed: of the draws.
        batch_size: examples per pass, of one size where more than one; does not change the result.
        strict: refuse frozen and tied parameters.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    likelihood: Likelihood = "bernoulli"
    labels: Literal["sampled", "true"] = "sampled"
    samples: Cases = 1
    seed: Seed = 0
    batch_size: Batch = 1
    strict: Flag = True

    def options(self, *, softmax: bool) -> dict[str, Any]:
        """Return the arguments of `estimate_fisher` for a network's task.

        Args:
            softmax: the outputs are classes that exclude each other.

        Raises:
            InputError: the likelihood is one of other outputs.
        """
        wanted = ("categorical",) if softmax else ("bernoulli", "dice")
        if self.likelihood != "auto" and self.likelihood not in wanted:
            raise InputError(
                f"fisher.likelihood: expected {' or '.join(wanted)} for a task "
                f"{'with' if softmax else 'without'} softmax (got {self.likelihood})"
            )
        likelihood = wanted[0] if self.likelihood == "auto" else self.likelihood
        return {**self.model_dump(), "likelihood": likelihood}
