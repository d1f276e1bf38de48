"""Images on which the channels of source networks are compared before they are brought into one order."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from timm_ext.cli.cases import cases_at, channel_names, prepare_labelled, told_names
from timm_ext.cli.common import say_once, task_of
from timm_ext.cli.fishers import settings_of_fisher
from timm_ext.errors import InputError

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
        channels: as `CHANNEL=NAME`, what the cases call channels of the networks.
    """

    cases: Path
    first: "Checkpoint"
    config: Path | None
    overrides: Sequence[str] | None
    channels: Sequence[str] = ()

    @classmethod
    def of(
        cls,
        cases: Path | None,
        first: "Checkpoint",
        config: Path | None,
        overrides: Sequence[str] | None,
        channels: Sequence[str],
    ) -> "ComparedOn | None":
        """Return the cases that the user names, None where they are none.

        Raises:
            InputError: names of channels, but no cases that have them.
        """
        if cases is None and channels:
            raise InputError("--channel: expected --data beside it, whose cases have these names (got none)")
        return None if cases is None else cls(cases, first, config, overrides, channels)

    def align(self, sources: "Sources") -> "Sources":
        """Align sources by their responses to the images of some cases.

        Raises:
            InputError: as for `Sources.aligned`, `read_cases` and `prepare_cases`.
        """
        images = self.images(sources.networks[0])
        found = sources.aligned(images)
        say_once(f"channels are compared by responses to images of {self.cases} ({len(images)})")
        return found

    def images(self, model: "nn.Module") -> "list[Tensor]":
        """Return a batch `[1, C, D, H, W]` of each of at most eight cases, taken evenly from all.

        Args:
            model: the first source's network.

        Raises:
            InputError: as for `read_cases` and `prepare_cases`.
        """
        from timm_ext.data.dataset import CaseDataset
        from timm_ext.interop.networks import images_of

        images, task = images_of(self.first), task_of(None, self.first)
        settings = settings_of_fisher(self.config, self.overrides, self.first, model, images)
        names = channel_names(self.channels, task)
        with told_names():
            cases = cases_at(self.cases, task, images, labelled=False, names=names)
        chosen = [replace(case, label=None, numbers=()) for case in cases[:: -(-len(cases) // _MOST)]]
        prepared = prepare_labelled(chosen, task, settings, images, None, 0)
        patch, seed = settings.fisher.patch, settings.fisher.seed
        data = CaseDataset(prepared, task, patch=patch, seed=seed, labelled=False)
        return [data[index]["image"][None] for index in range(len(data))]
