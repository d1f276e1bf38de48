#!/usr/bin/env bash
# Networks go from nnU-Net through timm-ext and back, each step by the commands that a user types.
#
#   tools/nnunet_round_trip.sh
#
# nnU-Net plans, preprocesses and trains two tiny data sets for two short epochs; timm-ext reads, predicts with,
# merges, adapts and exports the networks; nnU-Net trains and predicts with what came of them. Needs timm_ext and
# nnunetv2 in the `python` on the path (`pip install --no-deps nnunetv2` and what it imports), no GPU. Everything
# lies in a temporary folder. Each step prints what it did; the first that fails ends it with a non-zero status.
set -euo pipefail

work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
export nnUNet_raw="$work/raw" nnUNet_preprocessed="$work/preprocessed" nnUNet_results="$work/results"
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive nnUNet_def_n_proc=1 nnUNet_n_proc_DA=1 PYTHONWARNINGS=ignore
A="$nnUNet_results/Dataset501_A/nnUNetTrainer__nnUNetPlans__3d_fullres"
B="$nnUNet_results/Dataset502_B/nnUNetTrainer__nnUNetPlans__3d_fullres"
C="$nnUNet_results/Dataset503_C/nnUNetTrainer__nnUNetPlans__3d_fullres"
scans="$work/raw/Dataset503_C/imagesTr"

step() { printf '\n=== %s (%s s)\n' "$1" "$SECONDS"; }

# nnU-Net says much; it is shown where it fails.
quiet() {
  echo "+ $*" | sed "s|$work/||g"
  "$@" > "$work/log" 2>&1 || { cat "$work/log"; return 1; }
}

timm_ext() {
  echo "+ timm-ext $*" | sed "s|$work/||g"
  python -m timm_ext "$@" | sed "s|$work/||g"
}

# nnUNetv2_train in two epochs of a few iterations by nnU-Net's Adam, without the validation behind them.
nnunet_train() { nnUNet_n_proc_DA=0 quiet python "$work/nnUNetv2_train.py" "$@" -device cpu; }
cat > "$work/nnUNetv2_train.py" <<'PYTHON'
from functools import wraps

import torch
from nnunetv2.run.run_training import run_training_entry
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.training.nnUNetTrainer.variants.optimizer.nnUNetTrainerAdam import nnUNetTrainerVanillaAdam

planned = nnUNetTrainer.__init__


@wraps(planned)
def short(self, *arguments, **options):
    planned(self, *arguments, **options)
    self.num_epochs, self.initial_lr = 2, 3e-3
    self.num_iterations_per_epoch, self.num_val_iterations_per_epoch = 10, 1


torch.set_num_threads = lambda count: None  # it would take all cores
nnUNetTrainer.__init__ = short
nnUNetTrainer.configure_optimizers = nnUNetTrainerVanillaAdam.configure_optimizers
nnUNetTrainer.perform_actual_validation = lambda *arguments, **options: None
run_training_entry()
PYTHON

nnunet_predict() { # MODEL_FOLDER FOLD OUT
  quiet nnUNetv2_predict_from_modelfolder -i "$scans" -o "$3" -m "$1" -f "$2" -device cpu -npp 1 -nps 1 --disable_tta
}

# Label maps of two folders: voxels that differ, of the foreground; more than 0.002 fail.
compare() {
  python - "$1" "$2" <<'PYTHON'
import sys
from pathlib import Path

import nibabel
import numpy as np

one, other = (sorted(Path(folder).glob("*.nii.gz")) for folder in sys.argv[1:])
assert one and [path.name for path in one] == [path.name for path in other], (one, other)
pairs = [[np.asarray(nibabel.load(path).dataobj) for path in pair] for pair in zip(one, other)]
differ, foreground = (sum(int(f(*pair).sum()) for pair in pairs) for f in (np.not_equal, lambda a, b: a > 0))
print(f"{len(pairs)} label maps: {differ} of {foreground} voxels of the foreground differ")
sys.exit(not foreground or differ > 0.002 * foreground)
PYTHON
}

step "Two tiny data sets, and a third for which the networks are meant"
python - "$nnUNet_raw" <<'PYTHON'
import json
import sys
from pathlib import Path

import nibabel
import numpy as np

SHAPE, CASES = (24, 32, 24), 5
TASKS = {"Dataset501_A": ["left"], "Dataset502_B": ["right"], "Dataset503_C": ["left", "right"]}
generator, places = np.random.default_rng(0), np.indices(SHAPE)
for name, labels in TASKS.items():
    folder = Path(sys.argv[1]) / name
    for kind in ("imagesTr", "labelsTr"):
        (folder / kind).mkdir(parents=True)
    for case in range(CASES):
        scan, label = generator.normal(1, 0.1, SHAPE), np.zeros(SHAPE, np.uint8)
        for side, brightness in (("left", 2.0), ("right", 3.0)):
            centre = np.array([12, 9 if side == "left" else 23, 12]) + generator.uniform(-2, 2, 3)
            inside = ((places - centre[:, None, None, None]) ** 2).sum(0) < 30
            scan[inside] += brightness
            if side in labels:
                label[inside] = labels.index(side) + 1
        for kind, array, end in (("imagesTr", scan.astype(np.float32), "_0000"), ("labelsTr", label, "")):
            nibabel.save(nibabel.Nifti1Image(array, np.eye(4)), folder / kind / f"case{case}{end}.nii.gz")
    numbers = {"background": 0, **{label: number for number, label in enumerate(labels, 1)}}
    header = {"channel_names": {"0": "T1"}, "labels": numbers, "numTraining": CASES, "file_ending": ".nii.gz"}
    (folder / "dataset.json").write_text(json.dumps(header))
PYTHON
quiet nnUNetv2_plan_and_preprocess -d 501 502 503 -c 3d_fullres -np 1 -npfp 1 --no_pbar
python - "$nnUNet_preprocessed" <<'PYTHON'
import json
import sys
from pathlib import Path

for path in Path(sys.argv[1]).glob("*/nnUNetPlans.json"):
    plans = json.loads(path.read_text())
    settings = plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]
    settings["features_per_stage"] = [8 * 2**stage for stage in range(settings["n_stages"])]
    path.write_text(json.dumps(plans, indent=2))
    print(f"{path.parent.name}: {settings['n_stages']} stages, {settings['features_per_stage']} channels")
PYTHON

step "Trained by nnU-Net: A in two folds, B in one"
nnunet_train 501 3d_fullres 0
nnunet_train 501 3d_fullres 1
nnunet_train 502 3d_fullres 0

step "Read, and applied as nnUNetv2_predict does"
timm_ext info "$A" --fold 0
timm_ext predict "$A" "$scans" --fold 0 --out "$work/ours" --set predict.fast_layers=false
quiet nnUNetv2_predict_from_modelfolder -i "$scans" -o "$work/theirs" -m "$A" -f 0 -device cpu -npp 1 -nps 1
compare "$work/theirs" "$work/ours"

step "A and B merged for C, trained on by nnU-Net"
timm_ext merge "$A" "$B" --fold 0 --method mean-imm --align --for "$nnUNet_raw/Dataset503_C" --out "$work/init.pth"
nnunet_train 503 3d_fullres 0 -pretrained_weights "$work/init.pth"
nnunet_predict "$C" 0 "$work/continued"
compare "$work/continued" "$work/continued"

step "Folds of A merged into one network, applied by nnU-Net"
timm_ext merge "$A" --folds 0,1 --method mean-imm --align --keep-heads --out "$work/merged"
nnunet_predict "$work/merged" 0 "$work/merged_maps"

step "Exported, and the same tensors"
timm_ext export "$A" --fold 0 --out "$work/a.safetensors"
timm_ext export "$work/a.safetensors" --out "$work/a.pth"
python - "$A/fold_0/checkpoint_final.pth" "$work/a.pth" <<'PYTHON'
import sys

import torch

one, other = (torch.load(path, weights_only=False)["network_weights"] for path in sys.argv[1:])
assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
print(f"{len(one)} names, the same tensors")
PYTHON

step "Fishers of A and B on their own data, and an adaptation to C with them"
timm_ext fisher "$A" "$nnUNet_raw/Dataset501_A" --fold 0 --limit 2 --out "$work/fisher_a.safetensors"
timm_ext fisher "$B" "$nnUNet_raw/Dataset502_B" --fold 0 --limit 2 --out "$work/fisher_b.safetensors"
timm_ext adapt "$A" "$B" --fold 0 --fisher "$work/fisher_a.safetensors" --fisher "$work/fisher_b.safetensors" \
  --data "$nnUNet_raw/Dataset503_C" --set train.steps=4 --out "$work/adapted"

step "An adaptation without anybody's source data"
timm_ext adapt "$A" "$B" --fold 0 --align --data "$nnUNet_raw/Dataset503_C" --set train.steps=4 --out "$work/alone"

step "Adapted, exported, trained on and applied by nnU-Net"
timm_ext export "$work/adapted/network.safetensors" --out "$work/adapted.pth"
timm_ext export "$work/adapted/network.safetensors" --out "$work/adapted_folder"
nnunet_predict "$work/adapted_folder" 0 "$work/adapted_maps"
nnunet_train 503 3d_fullres 1 -pretrained_weights "$work/adapted.pth"
quiet nnUNetv2_predict -i "$scans" -o "$work/final" -d 503 -c 3d_fullres -f 1 -device cpu -npp 0 -nps 0 --disable_tta
compare "$work/final" "$work/final"

step "Done"
