"""Memory of a whole training by `fast_layers`, in fresh processes: bounded, and no more than without them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

MEBIBYTE = 1 << 20
PROGRAM = """
import json, resource, sys, tempfile
import torch
from timm_ext.networks import build_network
from timm_ext.ops.memory import kept_bytes
from timm_ext.training.callbacks import Callback
from timm_ext.training.examples import Data
from timm_ext.training.settings import TrainSettings
from timm_ext.training.trainer import Trainer

fast, steps = sys.argv[1] == "fast", int(sys.argv[2])
torch.set_num_threads(1)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


class Cases:
    def __init__(self, edges):
        self.edges = edges

    def __len__(self):
        return len(self.edges)

    def sample(self, index, epoch):
        generator = torch.Generator().manual_seed(index)
        image = torch.randn(2, *[self.edges[index]] * 3, generator=generator)
        return {"id": f"case{index}", "image": image, "target": (image[:1] > 0).float()}


class Note(Callback):
    peaks, kept = [], []

    def on_step(self, step, loss):
        self.peaks.append(peak())
        self.kept.append(kept_bytes())


model = build_network("isensee2017", in_channels=2, out_channels=1, seed=0, base_filters=8, levels=4)
chosen = TrainSettings(
    steps=steps, validate_every=2, batch_size=2, tensorboard=False, accelerator="cpu", fast_layers=fast
)
begin = peak()
with tempfile.TemporaryDirectory() as folder:
    # Validations of other sizes than the steps, in between: their holes do not fit each other.
    data = Data(Cases([32, 32]), Cases([40, 24, 32, 48]))
    Trainer(chosen, folder).fit(model, data, callbacks=[Note()])
print(json.dumps({"begin": begin, "peaks": Note.peaks, "kept": Note.kept, "end": peak()}))
"""


def run(way: str, steps: int) -> dict[str, list[int]]:
    command = [sys.executable, "-c", PROGRAM, way, str(steps)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parent)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_kept_memory_is_bounded_over_a_training() -> None:
    fast, plain = run("fast", 14), run("plain", 14)
    settled = 5  # behind the second validation
    assert 0 < fast["kept"][settled] < 400 * MEBIBYTE
    assert max(fast["kept"]) <= fast["kept"][settled]
    assert fast["peaks"][-1] - fast["peaks"][settled] < 8 * MEBIBYTE
    assert fast["end"] - fast["begin"] <= 1.05 * (plain["end"] - plain["begin"])
    assert max(plain["kept"]) == 0
