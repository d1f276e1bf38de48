"""The command `timm-ext`: thin commands over the library, heavy imports inside each."""

import sys

from timm_ext.cli.app import INTERRUPTED_BY, app, run
from timm_ext.cli.apply import evaluate, predict
from timm_ext.cli.data import phantom, prepare
from timm_ext.cli.demo import demo
from timm_ext.cli.info import info
from timm_ext.cli.initialise import adapt, merge
from timm_ext.cli.study import study
from timm_ext.cli.train import fisher, train
from timm_ext.system.signals import leave_quietly

__all__ = ["app", "main", "run"]

for command in (demo, phantom, prepare, train, fisher, merge, adapt, predict, evaluate, study, info):
    app.command()(command)


def main() -> None:
    """Run the command line and exit with its status."""
    status = run(sys.argv[1:])
    leave_quietly(interrupted=status > INTERRUPTED_BY)
    sys.exit(status)
