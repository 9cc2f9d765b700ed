"""What a pruning costs: the model runs as often whatever it is made of, and short cuts give what the long way gives."""

from __future__ import annotations

import copy
from collections import namedtuple

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

import torchslim as ts
from torchslim.channels import oracle
from torchslim.channels.leaves import filled, leaves
from torchslim.isolation import copy_model
from torchslim.prune.plan import analyse

Pair = namedtuple("Pair", "left right")


class Chain(nn.Sequential):
    pass


def chain(norm: type[nn.Module], depth: int) -> Chain:
    blocks = [nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), norm(16), nn.SiLU()) for _ in range(depth)]
    return Chain(nn.Conv2d(3, 16, 3), *blocks, nn.Flatten(), nn.Linear(16 * 6 * 6, 3)).eval()


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, nn.Identity])
@pytest.mark.parametrize("depth", [1, 4])
def test_the_model_runs_five_times(norm, depth):
    runs = []
    hook = register_module_forward_pre_hook(lambda module, _: runs.append(module) if type(module) is Chain else None)
    try:
        ts.prune.channels(chain(norm, depth), (torch.randn(2, 3, 8, 8),), of="channels", round_to=1, min_channels=1)
    finally:
        hook.remove()
    assert len(runs) == 5  # recorded; shapes tried; the smaller one, the masked one, and the unpruned one compared


def test_containers_are_filled_as_they_were_emptied():
    nested = ((1, [2.0, None]), {"a": Pair(torch.ones(1), ()), "b": torch.Size([3, 4])})
    again = filled(nested, iter(leaves(nested)))
    assert str(again) == str(nested)
    assert [type(each) for each in again[1].values()] == [Pair, torch.Size]


def test_what_is_kept_is_remembered_only_while_it_cannot_change():
    plan = analyse(chain(nn.BatchNorm2d, 1), (torch.randn(2, 3, 8, 8),))
    coupling = plan.coupling()
    value = coupling.trace.weights["0.weight"]
    removed = np.zeros(coupling.atoms.count, dtype=bool)
    assert coupling.shape(value, removed) == (16, 3, 3, 3)
    removed[coupling.groups[0].classes[:4]] = True
    assert coupling.shape(value, removed) == (12, 3, 3, 3)
    removed.setflags(write=False)
    assert coupling.shape(value, removed) == coupling.shape(value, removed) == (12, 3, 3, 3)
    assert coupling.shape(value, np.zeros_like(removed)) == (16, 3, 3, 3)


def test_copies_have_tables_of_hooks_of_their_own():
    model = chain(nn.BatchNorm2d, 1)
    model[0].lists = [[], (), np.arange(3)]  # attributes whose truth nobody may ask for
    copied, _ = copy_model(model)
    for module in copied.modules():
        module.register_forward_hook(lambda *_: None)
    assert not any(module._forward_hooks for module in model.modules())


def test_models_for_the_check_are_alike_in_both_precisions():
    model, inputs = chain(nn.BatchNorm2d, 1), (torch.ones(1, 3, 8, 8),)
    wide, narrow = (
        oracle.prepare(copy.deepcopy(model), inputs, dtype=dtype) for dtype in (torch.float64, torch.float32)
    )
    both = [(*model.state_dict().values(), *inputs) for model, inputs in (wide, narrow)]
    for one, two in zip(*both, strict=True):
        assert one.dtype == two.dtype == torch.int64 or (one.dtype, two.dtype) == (torch.float64, torch.float32)
        assert torch.allclose(one.double(), two.double())
