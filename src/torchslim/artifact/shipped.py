"""Check that the artifact of a stage computes what its model does."""

from __future__ import annotations

import tempfile
from pathlib import Path

from torch import nn

from torchslim.artifact.deployment import Compile, off
from torchslim.artifact.storage import load, write_artifact
from torchslim.quantize import QuantizedModule
from torchslim.runtimes import Deployed


def kept_right(model: nn.Module, deployed: Deployed, folder: Path) -> bool:
    """Whether the artifact in a folder computes what `model`, which it was made from, does.

    True without a comparison if the runtime has no file or the model does not carry its evidence.
    """
    if not isinstance(model, QuantizedModule) or model.evidence is None or not deployed.suffixes:
        return True
    return not off(model, load(folder, trusted=True))  # machine code in it was made by this run


def as_saved(compile_: Compile) -> Compile:
    """A function that deploys a model, saves it, and loads it again."""

    def saved(model: nn.Module) -> Deployed:
        with tempfile.TemporaryDirectory(prefix="torchslim-") as folder:
            write_artifact(folder, deployed=compile_(model))
            return load(folder, trusted=True)

    return saved
