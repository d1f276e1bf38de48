"""The command `timm-ext`: thin commands over the library, heavy imports inside each."""

import sys

from timm_ext.cli.advise import advise
from timm_ext.cli.app import app, run
from timm_ext.cli.apply import evaluate, predict
from timm_ext.cli.check import check
from timm_ext.cli.data import phantom, prepare
from timm_ext.cli.demo import demo
from timm_ext.cli.export import export
from timm_ext.cli.info import info
from timm_ext.cli.initialise import adapt, merge
from timm_ext.cli.study import study
from timm_ext.cli.train import fisher, train
from timm_ext.system.signals import watch_command

__all__ = ["app", "main", "run"]

for command in (
    *(
        demo,
        phantom,
        check,
        prepare,
        train,
        fisher,
        advise,
        merge,
        adapt,
        predict,
        evaluate,
        export,
        study,
        info,
    ),
):
    app.command()(command)


def main() -> None:
    """Run the command line and exit with its status."""
    watch_command()
    sys.exit(run(sys.argv[1:]))
