"""Does the artifact of a stage compute what its model does?"""

from __future__ import annotations

import tempfile
from pathlib import Path

from torch import nn

from torchslim.artifact.deployment import Compile, off
from torchslim.artifact.storage import load, write_artifact
from torchslim.quantize import QuantizedModule
from torchslim.runtimes import Deployed


def kept_right(model: nn.Module, deployed: Deployed, folder: Path) -> bool:
    """Does the artifact in a folder compute what the model does that it was made from?

    Where a runtime has no file, and where the model does not carry its evidence, there is nothing to compare.
    """
    if not isinstance(model, QuantizedModule) or model.evidence is None or not deployed.suffixes:
        return True
    return not off(model, load(folder, trusted=True))  # machine code, where it is such, was made by this very run


def as_saved(compile_: Compile) -> Compile:
    """Deploys a model, saves it, and loads it."""

    def saved(model: nn.Module) -> Deployed:
        with tempfile.TemporaryDirectory(prefix="torchslim-") as folder:
            write_artifact(folder, deployed=compile_(model))
            return load(folder, trusted=True)

    return saved
