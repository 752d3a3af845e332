"""The sweep command on two methods, two seeds and a model of no size, so that it can be killed and watched."""

import sys
from dataclasses import replace

from models import cli
from paper_figures.study import __main__ as command
from paper_figures.study import design

BASE = replace(
    design.PROFILES["smoke"].base, steps=30, layers=1, width=8, context=8, checkpoint_every=1, evaluation_windows=4
)
METHODS = {name: design.METHODS[name] for name in ("ce", "margin@layers")}
PROFILE = design.Profile((0, 1), (0,), BASE)

if __name__ == "__main__":
    design.METHODS = METHODS
    design.PROFILES["tiny"] = PROFILE
    cli.run(lambda: command.main(["sweep", "--profile", "tiny", *sys.argv[1:]]))
