"""Check that the artifact of a stage computes what its model does."""

from __future__ import annotations

import tempfile
from pathlib import Path

from torch import nn

from torchslim.artifact.assembled import AnyDeployed, pieces
from torchslim.artifact.deployment import Compile, off
from torchslim.artifact.loading import load_opened, opened_for_loading
from torchslim.artifact.storage import write_artifact
from torchslim.core.parts import part_at
from torchslim.quantize import QuantizedModule
from torchslim.runtimes import Deployed


def kept_right(model: nn.Module, deployed: AnyDeployed, folder: Path) -> bool:
    """Whether the artifact in a folder computes what `model`, which it was made from, does; of its parts, all.

    True without a comparison if the runtime has no file or the model does not carry its evidence.
    """
    for path, piece in pieces(deployed).items():
        part = part_at(model, path)
        if not isinstance(part, QuantizedModule) or part.evidence is None or not piece.suffixes:
            continue
        place = opened_for_loading(folder, None, None).programs()[path]
        loaded = load_opened(place, trusted=True)  # machine code was made by this run
        if off(part, loaded):
            return False
    return True


def as_saved(compile_: Compile) -> Compile:
    """A function that deploys a model, saves it, and loads it again."""

    def saved(model: nn.Module) -> Deployed:
        with tempfile.TemporaryDirectory(prefix="torchslim-") as folder:
            write_artifact(folder, deployed=compile_(model))
            return load_opened(opened_for_loading(folder, None, None), trusted=True)

    return saved
