"""The result of a run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from torchslim.artifact.assembled import AnyDeployed
from torchslim.artifact.storage import confirm, write_artifact
from torchslim.report import render, table


@dataclass(frozen=True, kw_only=True)
class Result:
    """The result of a run: `print(result)` shows the table, and `run` is the content of `run.json`.

    `model` is the final model (a `QuantizedModule` after quantization), `module` the last trainable model, `deployed`
    the artifact that ships.
    """

    model: nn.Module
    module: nn.Module
    masks: Mapping[str, Tensor]
    deployed: AnyDeployed
    run: dict[str, Any]
    folder: Path
    _keep: Any = field(repr=False, default=None)  # keeps a temporary folder as long as the result exists

    def save(self, folder: str | Path, *, key: Any = None) -> Path:
        """Write the artifact, the last trainable weights, `run.json` and `report.html` to a folder.

        `key` signs it, as in `torchslim.save`.
        """
        extra = {
            "run.json": (json.dumps(self.run, indent=1, allow_nan=False) + "\n").encode(),
            "report.html": render(self.run).encode(),
        }
        digest = write_artifact(
            folder, deployed=self.deployed, module=self.module, masks=self.masks, extra=extra, key=key
        )
        confirm(folder, self.deployed, digest)
        return Path(folder)

    def __str__(self) -> str:
        return table(self.run)
