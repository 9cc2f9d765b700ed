"""Steps for tests of workers and processes that an engine starts: one takes time, one prints where it runs."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

import torchslim as ts
from torchslim.core import distributed


@dataclass(frozen=True, kw_only=True)
class Wait:
    """Return the model as it is after some seconds, without using the processor: a test can stop a worker meanwhile."""

    accepts: ClassVar[ts.Form] = ts.Form.MODULE
    produces: ClassVar[ts.Form] = ts.Form.MODULE
    seconds: float = 1.0

    def check(self, ctx: ts.Context) -> None: ...

    def __call__(self, model: nn.Module, ctx: ts.Context) -> ts.Outcome:
        time.sleep(self.seconds)
        return ts.Outcome(model=model, masks=ctx.masks)


@dataclass(frozen=True, kw_only=True)
class Tell:
    """Return the model as it is; print how many processes run this step together, and this one's node of Slurm."""

    accepts: ClassVar[ts.Form] = ts.Form.MODULE
    produces: ClassVar[ts.Form] = ts.Form.MODULE

    def check(self, ctx: ts.Context) -> None: ...

    def __call__(self, model: nn.Module, ctx: ts.Context) -> ts.Outcome:
        print(f"one of {distributed.count()} on node {os.environ['SLURM_NODEID']}", flush=True)
        return ts.Outcome(model=model, masks=ctx.masks)
