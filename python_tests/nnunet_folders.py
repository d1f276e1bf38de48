"""Folders as nnU-Net v2 leaves them after training, with a tiny network in them."""

import json

import numpy as np
import torch

from timm_ext.cli import run
from timm_ext.networks.registry import build_network

HEADER = {"channel_names": {"0": "MRI"}, "labels": {"background": 0, "front": 1, "back": 2}}
HEADER |= {"file_ending": ".nii.gz", "numTraining": 4, "name": "tiny"}
KWARGS = {
    "n_stages": 3,
    "features_per_stage": [4, 8, 8],
    "conv_op": "torch.nn.modules.conv.Conv3d",
    "kernel_sizes": [[1, 3, 3], [3, 3, 3], [3, 3, 3]],
    "strides": [[1, 1, 1], [1, 2, 2], [2, 2, 2]],
    "n_conv_per_stage_decoder": [2, 2],
    "conv_bias": True,
    "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
    "norm_op_kwargs": {"eps": 1e-05, "affine": True},
    "dropout_op": None,
    "dropout_op_kwargs": None,
    "nonlin": "torch.nn.LeakyReLU",
    "nonlin_kwargs": {"inplace": True},
}
PREPARATION = {
    "preprocessor_name": "DefaultPreprocessor",
    "normalization_schemes": ["ZScoreNormalization"],
    "use_mask_for_norm": [False],
    "resampling_fn_data": "resample_data_or_seg_to_shape",
    "resampling_fn_data_kwargs": {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None},
    "resampling_fn_probabilities": "resample_data_or_seg_to_shape",
    "resampling_fn_probabilities_kwargs": {
        "is_seg": False,
        "order": 1,
        "order_z": 0,
        "force_separate_z": None,
    },
}
_BY_STAGE = ("features_per_stage", "kernel_sizes", "strides")
DEPTHS = {"PlainConvUNet": "n_conv_per_stage", "ResidualEncoderUNet": "n_blocks_per_stage"}
OLD = {
    "UNet_class_name": "PlainConvUNet",
    "UNet_base_num_features": 4,
    "unet_max_num_features": 8,
    "n_conv_per_stage_encoder": [2, 2, 2],
    "n_conv_per_stage_decoder": [2, 2],
    "num_pool_per_axis": [1, 2, 2],
    "pool_op_kernel_sizes": [[1, 1, 1], [1, 2, 2], [2, 2, 2]],
    "conv_kernel_sizes": [[1, 3, 3], [3, 3, 3], [3, 3, 3]],
    "patch_size": [8, 16, 16],
}


def options_of(name="PlainConvUNet", stages=3):
    """Return the options of a network; a further stage halves all edges once more."""
    fitted = {key: (KWARGS[key] + KWARGS[key][-1:] * stages)[:stages] for key in _BY_STAGE}
    decoder = {"n_stages": stages, "n_conv_per_stage_decoder": [2] * (stages - 1)}
    return {**KWARGS, **fitted, **decoder, DEPTHS[name]: [2] * stages}


def plans_of(name="PlainConvUNet", **configuration):
    architecture = {
        "network_class_name": f"dynamic_network_architectures.architectures.unet.{name}",
        "arch_kwargs": options_of(name),
        "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
    }
    base = {
        "patch_size": [8, 16, 16],
        "spacing": [1.0, 1.0, 1.0],
        "architecture": architecture,
        **PREPARATION,
    }
    configurations = {"base": base, "3d_fullres": {"inherits_from": "base", **configuration}}
    plans = {"dataset_name": "Dataset999_Tiny", "plans_name": "nnUNetPlans", "configurations": configurations}
    plans |= {"transpose_forward": [0, 1, 2], "transpose_backward": [0, 1, 2]}
    return plans | {"image_reader_writer": "SimpleITKIO", "foreground_intensity_properties_per_channel": {}}


def network(name="PlainConvUNet", *, seed, channels=1, outputs=3):
    return build_network(
        f"nnunet.{name}", in_channels=channels, out_channels=outputs, seed=seed, **options_of(name)
    ).eval()


def checkpoint_of(model, plans, header=None, **changes):
    return {
        "network_weights": model.state_dict(),
        "optimizer_state": {"state": {0: {"momentum_buffer": torch.ones(3)}}, "param_groups": [{"lr": 0.01}]},
        "grad_scaler_state": None,
        "logging": {"mean_fg_dice": [np.float64(0.5), np.float32(0.75)], "lrs": [0.01]},
        "_best_ema": np.float64(0.7),
        "current_epoch": 2,
        "init_args": {
            "plans": plans,
            "configuration": "3d_fullres",
            "fold": 0,
            "dataset_json": header or HEADER,
            "device": torch.device("cpu"),
        },
        "trainer_name": "nnUNetTrainer",
        "inference_allowed_mirroring_axes": (0, 1, 2),
        **changes,
    }


def write_model_folder(path, models, plans=None, header=None):
    """Write a configuration's results; `models` by fold."""
    plans, header = plans or plans_of(), header or HEADER
    for fold, model in models.items():
        folder = path / f"fold_{fold}"
        folder.mkdir(parents=True)
        torch.save(checkpoint_of(model, plans, header), folder / "checkpoint_final.pth")
    (path / "plans.json").write_text(json.dumps(plans))
    (path / "dataset.json").write_text(json.dumps(header))
    return path


def refused(capsys, *arguments):
    capsys.readouterr()
    assert run(list(map(str, arguments))) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert "Traceback" not in error
    return error
