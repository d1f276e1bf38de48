"""Programs that run a network's forward pass on the CPU, each from the same PyTorch module.

OpenVINO and ONNX Runtime are imported when asked for (`pip install openvino onnx onnxruntime`).
"""

import io
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.networks import heads
from benchmarks.ways import WAYS, Way

Forward = Callable[[], Tensor]


def by_torch(way: Way) -> Callable[[nn.Module, Tensor], Forward]:
    """The finest map of logits by PyTorch."""

    def make(model: nn.Module, images: Tensor) -> Forward:
        model, images = way.ready(model, images)

        def forward() -> Tensor:
            with torch.inference_mode(), way.surroundings(), way.autocast():
                return heads(model(images))[0]

        return forward

    return make


def by_openvino(precision: str) -> Callable[[nn.Module, Tensor], Forward]:
    """OpenVINO for one call at a time, by a hint of the precision."""

    def make(model: nn.Module, images: Tensor) -> Forward:
        import openvino

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            converted = openvino.convert_model(model, example_input=images, input=[tuple(images.shape)])
        settings: dict[str, Any] = {
            "INFERENCE_PRECISION_HINT": precision,
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": "1",
        }
        request = openvino.Core().compile_model(converted, "CPU", settings).create_infer_request()
        array = images.numpy()
        return lambda: torch.from_numpy(request.infer([array], share_inputs=True)[0])

    return make


def by_onnxruntime(model: nn.Module, images: Tensor) -> Forward:
    """ONNX Runtime with its default optimisations."""
    import onnxruntime

    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(model, (images,), file, input_names=["images"], dynamo=False)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = torch.get_num_threads(), 3
    session = onnxruntime.InferenceSession(file.getvalue(), options, providers=["CPUExecutionProvider"])
    array = images.numpy()
    return lambda: torch.from_numpy(session.run(None, {"images": array})[0])


MAKERS: dict[str, Callable[[nn.Module, Tensor], Forward]] = {
    **{name: by_torch(way) for name, way in WAYS.items()},
    "openvino": by_openvino("f32"),
    "openvino bfloat16": by_openvino("bf16"),
    "onnxruntime": by_onnxruntime,
}
TITLES = {
    **{name: way.title for name, way in WAYS.items()},
    "openvino": "OpenVINO",
    "openvino bfloat16": "OpenVINO, bfloat16",
    "onnxruntime": "ONNX Runtime",
}
