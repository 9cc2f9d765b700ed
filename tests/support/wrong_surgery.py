"""Surgeries that are wrong on purpose, and whether verification objects to them."""

from __future__ import annotations

from dataclasses import replace

import torch

from torchslim.prune.dependency import verification
from torchslim.prune.structured.plan import Plan
from torchslim.prune.structured.removal import Shrunk
from torchslim.prune.structured.surgery import Cut, Surgery, perform


def noticed(plan: Plan, done: Shrunk, surgery: Surgery) -> bool:
    """Does the check object to this surgery in place of the right one?"""
    base = verification.prepare(plan.model, torch.float64)
    try:
        shrunk = perform(base, surgery)
    except IndexError:
        return True
    wide = verification.vary(plan.inputs, torch.float64)
    diverged = verification.verify(lambda: shrunk, lambda: base, done.coupling, done.removed, wide).divergence
    return diverged is not None


def with_cut(surgery: Surgery, old: Cut, new: Cut | None) -> Surgery:
    return replace(surgery, cuts=tuple(each for each in (new if cut is old else cut for cut in surgery.cuts) if each))
