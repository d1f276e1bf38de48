"""Commands that turn source networks into an initialisation: merge and adapt."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from timm_ext.cli.cases import Given, new_task
from timm_ext.cli.common import (
    Align,
    AlignWhereNeeded,
    Cache,
    ChannelNames,
    Config,
    Data,
    Fishers,
    Fold,
    Folds,
    NamedNetworks,
    Networks,
    Overrides,
    Resume,
    TaskOption,
    ValCases,
    ValShare,
    Workers,
    hold_output,
    note_settings,
    settings_dict,
    settings_from,
    with_alignment,
)
from timm_ext.cli.compared import ComparedOn
from timm_ext.cli.export import Facts, check_form, write_network
from timm_ext.cli.fishers import InPassing
from timm_ext.cli.planned import network_of_task, with_noted_window
from timm_ext.cli.session import begun, evidence_told, facts_of_run, learned, planned
from timm_ext.cli.sources import first_of, folds_of, read_sources, started
from timm_ext.cli.streamed import merge_as_they_are, parse_ratios, refuse_streams
from timm_ext.cli.told import tell_unlike_spacing
from timm_ext.errors import InputError
from timm_ext.system.terminal import say

if TYPE_CHECKING:
    from timm_ext.checkpoint import Checkpoint
    from timm_ext.config import RunSettings
    from timm_ext.interop.named import Named
    from timm_ext.interop.nnunet.target import Target
    from timm_ext.transfer.arms import Arm

_MergedOut = Annotated[
    Path,
    typer.Option(
        "--out",
        metavar="PATH",
        help="Merged network (.safetensors); .pth for PyTorch and `nnUNetv2_train -pretrained_weights`; a "
        "folder of nnU-Net's networks, or with --ratios of shards.",
    ),
]
_MergeMethod = Annotated[
    str | None,
    typer.Option("--method", help="mean-imm, mode-imm (default), mean-aligned, transfer-1, …"),
]
_NewTask = Annotated[
    str | None,
    typer.Option("--task", metavar="TASK", help="New task; default: that of the first network."),
]
_Ratios = Annotated[
    str | None,
    typer.Option(
        "--ratios", metavar="R1,R2,…", help="Merge every tensor by these, of checkpoints of any architecture."
    ),
]
_ShardSize = Annotated[
    str | None, typer.Option("--shard-size", metavar="SIZE", help="With --ratios: of shards, e.g. 5GB.")
]
_Hashes = Annotated[
    bool, typer.Option("--sha256", help="With --ratios: note the sources' hashes; reads them once more.")
]
_For = Annotated[
    Path | None,
    typer.Option(
        "--for",
        metavar="DATASET",
        help="New data set of nnU-Net's networks: its raw or preprocessed folder, `dataset.json` or plans.",
    ),
]
_KeepHeads = Annotated[
    bool, typer.Option("--keep-heads", help="Merge heads and norms, too: of networks of one task.")
]
_Compared = Annotated[
    Path | None,
    typer.Option(
        "--data",
        metavar="CASES",
        help="With --align: cases on whose images (no labels) channels are compared; default: weights are.",
    ),
]
_Adaptation = Annotated[str, typer.Option("--method", help="t-imm, imm-warmup, medmerge, …")]
_SourceData = Annotated[
    list[Path] | None,
    typer.Option(
        "--source-data",
        metavar="CASES",
        help="Cases of each network's own task, in their order, for its Fisher; default: the images of "
        "--data, labels sampled from each network's prediction.",
    ),
]
_SECTIONS = ("prepare", "merge", "adapt", "train", "predict")  # of settings that the network's file notes
_SHARE_OF_STEPS = 0.2  # of a whole training that an adaptation takes unless the settings say


def merge(
    networks: Networks,
    out: _MergedOut,
    fishers: Fishers = None,
    method: _MergeMethod = None,
    align: Align = False,
    data: _Compared = None,
    channels: ChannelNames = None,
    task: _NewTask = None,
    target: _For = None,
    fold: Fold = None,
    folds: Folds = None,
    keep_heads: _KeepHeads = False,
    named: NamedNetworks = None,
    config: Config = None,
    overrides: Overrides = None,
    ratios: _Ratios = None,
    shard_size: _ShardSize = None,
    hashes: _Hashes = False,
) -> None:
    """Merge source networks into an initialisation for a task, or any checkpoints as they are.

    By a method, heads and, unless `merge.transfer_norms` is set, norms start anew, running statistics with
    them; those of merged norms are the mean of the sources' by the same ratios. Networks of nnU-Net v2 are
    taken as model folders, checkpoints or exported zip files. With `--ratios`, every tensor is merged and
    nothing starts anew, unless for another task: checkpoints of any architecture, PyTorch or safetensors
    files or folders of shards, the latter larger than memory if need be, optionally weighted by one
    `--fisher` of the same layout for each. `--align` wants networks that their files describe;
    `--data` lets it compare responses to images in place of weights.

    Example: `timm-ext merge M1.safetensors M2.safetensors --fisher F1.safetensors --fisher F2.safetensors
    --method mode-imm --task brats --out init.safetensors`

    Example: `timm-ext merge FOLDER_A FOLDER_B --method mean-imm --align --for nnUNet_raw/Dataset503_X
    --out init.pth`

    Example: `timm-ext merge a.pth b.pth --ratios 0.7,0.3 --out merged.pth`
    """
    from timm_ext.checkpoint import check_replaced
    from timm_ext.interop.named import named_for
    from timm_ext.interop.networks import is_foreign

    hold_output(out, folder=False, inputs=[*(path for path in networks if path.is_file()), *(fishers or ())])
    check_replaced(out, "merged")
    if ratios is not None and method is not None:
        raise InputError("--ratios: expected no --method beside it (got both)")
    networks_only = (align, data, channels, task, target, fold, folds, config, overrides, named)
    if ratios is not None and not any(networks_only) and not any(map(is_foreign, networks)):
        merge_as_they_are(networks, out, parse_ratios(ratios), fishers or (), shard_size, hashes)
        return
    refuse_streams([*networks, *(fishers or ())], {"--shard-size": shard_size, "--sha256": hashes})
    networks = folds_of(networks, folds, fold)
    names = named_for(networks, named or ())
    first = first_of(networks, fold, names)
    settings = settings_from(config, with_alignment(overrides, align), first)
    given = None if ratios is None else parse_ratios(ratios)
    compared = ComparedOn.of(data, first, config, overrides, channels or ())
    start = _Merge(method or "mode-imm", task, target, fold, keep_heads, names, given, compared)
    start.write(networks, out, fishers or (), first, settings)


@dataclass(frozen=True)
class _Merge:
    """A merge of the shared parameters of networks of one architecture, without data.

    Attributes:
        method: name of the arm.
        task: of the new network; None is that of the first.
        target: nnU-Net's data set that it is for, in place of a task.
        fold: of nnU-Net's folders.
        keep_heads: heads and norms are merged, too.
        named: networks that the user names, by the sources' files.
        ratios: in place of a method; all is merged, too, unless it is for another task.
        compared_on: cases on whose images channels are compared.
    """

    method: str
    task: str | None
    target: Path | None
    fold: str | None
    keep_heads: bool
    named: "Mapping[Path, Named]"
    ratios: Sequence[float] | None = None
    compared_on: ComparedOn | None = None

    def write(
        self,
        networks: Sequence[Path],
        out: Path,
        fishers: Sequence[Path],
        first: "Checkpoint",
        settings: "RunSettings",
    ) -> None:
        """Merge and write the network.

        Raises:
            InputError: the method is more than a merge; the message names the commands to use.
        """
        from timm_ext.data.tasks import get_task, task_from_dict, task_to_dict
        from timm_ext.interop.nnunet.model import NOTE
        from timm_ext.transfer.start import aligns

        arm = self._arm(len(networks), with_fisher=bool(fishers))
        if settings.merge.fits_heads:
            raise InputError(
                "merge.head: expected given, for no cases are seen here (got fitted); timm-ext adapt and "
                "timm-ext train fit heads to cases"
            )
        if self.compared_on is not None and not aligns(arm.merge, settings.merge):
            raise InputError(
                "--data: expected --align beside it, which compares channels on images (got none)"
            )
        target = self._target(first)
        noted = target.noted if target is not None else first.metadata.get(NOTE)
        more: dict[str, Any] = {} if noted is None else {NOTE: noted}
        check_form(out, more)
        given = None if self.task is None else get_task(self.task)
        if given is not None and noted is not None:
            own = task_from_dict(first.metadata["task"], where=first.path)
            if (given.modalities, given.output_names) != (own.modalities, own.output_names):
                raise InputError(
                    f"--task: expected channels and labels of {first.path}, whose dataset.json is written "
                    "beside the network (got others); --for DATASET takes those of a new data set"
                )
        read = read_sources(networks, fishers, first=first, fold=self.fold, named=self.named, target=target)
        whole = self.ratios is not None and given is None and target is None
        read, settings = read.aligned(arm, read.settings(settings), compared_on=self.compared_on)
        keep = self.keep_heads or whole
        chosen, start = started(arm, read, given, settings, target=target, keep_heads=keep)
        sources, settings = read.sources, with_noted_window(settings, first)
        more["merge"] = {"method": arm.name, "sources": list(sources.names)}
        more["merge"] |= {} if self.ratios is None else {"ratios": list(self.ratios)}
        noted_settings = settings_dict(settings, "prepare", "merge", "predict")
        facts = Facts("merged", task_to_dict(chosen), sources.hashes, noted_settings, more)
        use = write_network(out, start.model, facts)
        note_settings(out, settings, folder=False)
        say(f"{out}: {arm.title} of {', '.join(sources.names)}{f'; {use}' if use else ''}")

    def _target(self, first: "Checkpoint") -> "Target | None":
        from timm_ext.interop.nnunet.target import read_target
        from timm_ext.interop.nnunet.write import noted_by_nnunet

        if self.target is None:
            return None
        if self.task is not None:
            raise InputError("--for: expected no --task beside it, which the data set names itself")
        return read_target(self.target, noted_by_nnunet(first.metadata, first.path))

    def _arm(self, models: int, *, with_fisher: bool) -> "Arm":
        from timm_ext.merging.merge import by_ratios
        from timm_ext.transfer.arms import Arm, get_arm

        if self.ratios is not None:
            return Arm.of(by_ratios(self.ratios, models, with_fisher=with_fisher))
        arm = get_arm(self.method)
        if arm.learns:
            raise InputError(f"method: {self.method} learns on data of the new task; use timm-ext adapt")
        for tie, value in arm.tuning.ties().items():
            raise InputError(
                f"method: {self.method} is a way of fine-tuning; merge by {arm.merge.name}, then use "
                f"timm-ext train --init with --set train.{tie}={value:g}"
            )
        return arm


def adapt(
    networks: Networks,
    data: Data,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder of the run.")],
    task: TaskOption = None,
    fishers: Fishers = None,
    source_data: _SourceData = None,
    method: _Adaptation = "t-imm",
    align: AlignWhereNeeded = None,
    fold: Fold = None,
    folds: Folds = None,
    val: ValCases = None,
    val_share: ValShare = 0.2,
    resume: Resume = False,
    named: NamedNetworks = None,
    config: Config = None,
    overrides: Overrides = None,
    cache: Cache = None,
    workers: Workers = 0,
) -> None:
    """Learn the mixing ratios and the task-specific layers, nothing else, on data of the new task.

    Fishers that are not given are estimated first and kept in `fishers/`. Writes the folded
    `network.safetensors`, ready for `timm-ext train --init`, and, in `training/`, the ratios per layer over
    time. With `t-imm-annealed` and `mode-imm-posterior` all other weights are trained, too: the network is
    then the fine-tuned one. `--set merge.head=fitted` first fits the heads to the cases, also those of a
    merge that learns nothing else; `best-by-evidence` takes the one source whose fitted heads explain the
    labels best. Neither of the two withholds a case for validation.

    Example: `timm-ext adapt M1.safetensors M2.safetensors --data BraTS2021/ --task brats --out adapted`
    """
    from timm_ext.interop.named import named_for
    from timm_ext.interop.networks import images_of
    from timm_ext.transfer.arms import get_arm

    networks = folds_of(networks, folds, fold)
    _hold(out, networks, fishers or (), source_data or ())
    arm = get_arm(method)
    _check_validates(arm, val)
    given = Given(data, task, val, val_share if arm.trains else 0.0, out, cache, workers, resume)
    first = first_of(networks, fold, named=(names := named_for(networks, named or ())))
    chosen, images = new_task(task, data, images_of(first))
    settings = settings_from(config, with_alignment(overrides, align), first)
    settings.train.refuse_ties("timm-ext adapt")
    _check_learns(arm, settings)
    options, settings = settings.adapt.of(arm), begun(settings, given)
    read = read_sources(networks, fishers or (), first=first, fold=fold, named=names)
    read, settings = read.aligned(arm, read.settings(settings), align_unrelated=align is None)
    read.check(arm, chosen, settings)
    network, share = network_of_task(settings, chosen), _SHARE_OF_STEPS if arm.adaptation else 1.0
    training = planned(given, settings, chosen, network, fixed=True, share=share, images=images)
    tell_unlike_spacing(training.settings, networks, read.sources)
    read = read.weighed(arm, InPassing(given, chosen, source_data or (), config, overrides))
    sources, (_, start) = read.sources, started(arm, read, chosen, training.settings)
    facts = facts_of_run(training.settings, sources.named_hashes(), sources.fisher_hashes, method=method)
    session = training.session(start.model, _title(arm), facts, steps=arm.trains)
    done = learned(arm, start, session, options)
    noted = {"method": method, "sources": list(sources.names), **done.start.provenance()}
    path = training.save(done.network, sources.hashes, *_SECTIONS, kind="merged", merge=noted)
    say(f"{path}: {arm.title} of {', '.join(sources.names)}{_ratios_told(noted)}{evidence_told(done.start)}")


def _hold(out: Path, networks: Sequence[Path], fishers: Sequence[Path], source_data: Sequence[Path]) -> None:
    hold_output(out, folder=True, inputs=[*(path for path in networks if path.is_file()), *fishers])
    if fishers and source_data:
        raise InputError("--source-data: expected no --fisher beside it (got both)")
    if source_data and len(source_data) != len(networks):
        raise InputError(
            f"--source-data: expected cases for each of {len(networks)} networks, in their order (got "
            f"{len(source_data)})"
        )


def _check_validates(arm: "Arm", val: Path | None) -> None:
    if val is not None and not arm.trains:
        raise InputError(
            f"--val: expected none for {arm.name}, which takes no step to validate (got {val}); heads are "
            "fitted to all of --data"
        )


def _check_learns(arm: "Arm", settings: "RunSettings") -> None:
    if not (arm.learns or settings.merge.fits_heads):
        raise InputError(
            f"method: {arm.name} learns nothing before fine-tuning; use timm-ext merge, or --set "
            "merge.head=fitted, which fits its heads to the cases"
        )


def _ratios_told(noted: Mapping[str, Any]) -> str:
    means = noted.get("mean_ratios")
    return "" if means is None else f", mean ratios {[round(mean, 2) for mean in means]}"


def _title(arm: "Arm") -> str:
    if arm.adaptation is None:
        return "fine-tuning"
    return "adaptation" if arm.adaptation.ratios else "warm-up"
