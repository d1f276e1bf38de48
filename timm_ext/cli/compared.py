"""Images on which the channels of source networks are compared before they are brought into one order."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from timm_ext.cli.cases import cases_at, prepare_labelled
from timm_ext.cli.common import say_once, task_of
from timm_ext.cli.fishers import settings_of_fisher

if TYPE_CHECKING:
    from torch import Tensor, nn

    from timm_ext.checkpoint import Checkpoint
    from timm_ext.transfer.sources import Sources

_MOST = 8  # cases


@dataclass(frozen=True)
class ComparedOn:
    """Cases whose images, not labels, say which channels of networks are alike.

    Attributes:
        cases: the data set.
        first: the first source's checkpoint, as whose images they are prepared.
        config: of the command.
        overrides: of the command.
    """

    cases: Path
    first: "Checkpoint"
    config: Path | None
    overrides: Sequence[str] | None

    def align(self, sources: "Sources") -> "Sources":
        """Align sources by their responses to the images of some cases.

        Raises:
            InputError: as for `Sources.aligned`, `read_cases` and `prepare_cases`.
        """
        images = self._images(sources.networks[0])
        found = sources.aligned(images)
        say_once(f"channels are compared by responses to images of {self.cases} ({len(images)})")
        return found

    def _images(self, model: "nn.Module") -> "list[Tensor]":
        from timm_ext.data.dataset import CaseDataset
        from timm_ext.interop.networks import images_of

        images, task = images_of(self.first), task_of(None, self.first)
        settings = settings_of_fisher(self.config, self.overrides, self.first, model, images)
        cases = cases_at(self.cases, task, images, labelled=False)
        chosen = [replace(case, label=None, numbers=()) for case in cases[:: -(-len(cases) // _MOST)]]
        prepared = prepare_labelled(chosen, task, settings, images, None, 0)
        patch, seed = settings.fisher.patch, settings.fisher.seed
        data = CaseDataset(prepared, task, patch=patch, seed=seed, labelled=False)
        return [data[index]["image"][None] for index in range(len(data))]
