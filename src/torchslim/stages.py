"""The working folder of a run: it belongs to one recipe, and keeps every finished stage for a run that goes on."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from torchslim.artifact import load, open_artifact, write_artifact
from torchslim.errors import RecipeError, TorchslimError
from torchslim.export import signature_of
from torchslim.files import digest, write_json
from torchslim.isolation import copy_model
from torchslim.quantize import QuantizedModule
from torchslim.runtimes import Deployed
from torchslim.runtimes.pt2 import load_program
from torchslim.steps import Form, Step, canonical

COMMIT = "stage.json"  # written last: a stage folder that has it is whole


@dataclass(kw_only=True)
class Stage:
    """The model after a step (or before the first), deployed and measured.

    `module` is the last trainable model: `model` itself, or where that is quantized, the one before.
    """

    name: str
    folder: Path
    model: nn.Module
    module: nn.Module
    masks: Mapping[str, Tensor]
    deployed: Deployed
    row: dict[str, Any]

    def keep(self, key: str) -> None:
        """Write the stage to its folder, in the place of what an earlier run left there."""
        if self.folder.exists():
            shutil.rmtree(self.folder)
        module = None if isinstance(self.model, QuantizedModule) else self.model
        write_artifact(self.folder, deployed=self.deployed, module=module, masks=self.masks)
        write_json(self.folder / COMMIT, {"key": key, "row": self.row})


def stage_key(before: str, step: Step, steps: Sequence[Step], seed: int) -> str:
    """What a step's result depends on: what it was made from, the step, and, where it measures what ships, the rest."""
    ahead = [canonical(each) for each in steps] if getattr(step, "of", None) == "latency" else []
    table = getattr(step, "latency_table", None)  # what it says counts, not only where it is
    told = [read_text(Path(table)) or ""] if table else []
    return digest(before, canonical(step), seed, *ahead, *told)


def restored(
    folder: Path, key: str, form: Form, module: nn.Module, model: nn.Module, classes: dict[str, type]
) -> Stage | None:
    """The stage that an earlier run finished, if it is this one and whole.

    Args:
        folder: where it was kept.
        key: says what it was made from.
        form: what its step gives.
        module: of the stage before, from which it is made again: channels that its step removed are removed once more.
        model: of the stage before.
        classes: of the model's outputs, by name.
    """
    text = read_text(folder / COMMIT)
    if text is None:
        return None
    try:
        saved = json.loads(text)
        if saved["key"] != key:
            return None
        opened = open_artifact(folder)
        deployed = load(folder, trusted=True)  # this run's own folder: it holds what the run itself compiled
        deployed.classes = classes
        if form is Form.QUANTIZED:
            program = load_program(io.BytesIO(opened.read("model.pt2"))).module()
            spec = deployed.spec
            made: nn.Module = QuantizedModule(program, signature_of(model), spec.inputs, spec.outputs, classes)
        else:
            made = module = opened.into(copy_model(module)[0])
        return Stage(
            name=saved["row"]["name"], folder=folder, model=made, module=module, masks=opened.masks(),
            deployed=deployed, row=saved["row"],
        )  # fmt: skip
    except (TorchslimError, KeyError, ValueError):
        return None  # damaged, or a step of the user's own changed the architecture: it is taken again


def claim(folder: Path, recipe: dict[str, Any], overwrite: bool) -> None:
    """A working folder belongs to one recipe."""
    path = folder / "recipe.json"
    if path.exists() and not overwrite:
        try:
            other = json.loads(path.read_text())
        except ValueError as error:
            raise RecipeError(f"{path} is damaged; delete {folder}, or run with overwrite") from error
        if other != json.loads(json.dumps(recipe)):
            raise RecipeError(
                f"{folder} holds the run of another recipe ({_what_differs(other, recipe)}); choose another folder, or "
                "run with overwrite to replace it"
            )
    elif not path.exists() and folder.is_dir() and any(folder.iterdir()):
        raise RecipeError(f"{folder} holds files that no run of torchslim left there; choose another folder")
    write_json(path, recipe)


def _what_differs(old: dict[str, Any], new: dict[str, Any]) -> str:
    if len(old["steps"]) != len(new["steps"]):
        return f"{len(old['steps'])} steps there, {len(new['steps'])} here"
    for index, (a, b) in enumerate(zip(old["steps"], json.loads(json.dumps(new["steps"])), strict=True), 1):
        for key in {**a, **b}:
            if a.get(key) != b.get(key):
                return f"step {index}, {key}: {a.get(key)!r} there, {b.get(key)!r} here"
    keys = [key for key in ("model", "task", "target", "seed") if old.get(key) != new.get(key)]
    return ", ".join(f"{key}: {old.get(key)!r} there, {new.get(key)!r} here" for key in keys)


def read_text(path: Path) -> str | None:
    """A file's text; None where there is no file."""
    return path.read_text() if path.is_file() else None
