"""What a pruning costs: the model runs as often whatever it is made of, and short cuts give what the long way gives."""

from __future__ import annotations

from collections import namedtuple

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

import torchslim as ts
from torchslim.core.isolation import copy_model, is_plain
from torchslim.prune.dependency import verification
from torchslim.prune.dependency.leaves import filled, leaves
from torchslim.prune.structured.plan import analyze

Pair = namedtuple("Pair", "left right")


class Chain(nn.Sequential):
    pass


def chain(norm: type[nn.Module], depth: int) -> Chain:
    blocks = [nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), norm(16), nn.SiLU()) for _ in range(depth)]
    return Chain(nn.Conv2d(3, 16, 3), *blocks, nn.Flatten(), nn.Linear(16 * 6 * 6, 3)).eval()


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, nn.Identity])
@pytest.mark.parametrize("depth", [1, 4])
def test_the_model_runs_as_often_at_any_depth(norm, depth):
    runs = []

    def remember(module, args):
        if type(module) is Chain:
            runs.append(tuple(args[0].shape))

    hook = register_module_forward_pre_hook(remember)
    try:
        ts.prune.channels(chain(norm, depth), (torch.randn(2, 3, 8, 8),), of="channels", round_to=1, min_channels=1)
    finally:
        hook.remove()
    # recorded; shapes tried; the smaller one, the masked one, and the unpruned one compared
    assert runs.count((2, 3, 8, 8)) == 5
    # images of three other sizes, which the last layer refuses; another batch: recorded, and two compared
    assert len(set(runs)) == 5
    assert runs.count((3, 3, 8, 8)) == 3
    assert len(runs) == 11


def test_containers_are_filled_as_they_were_emptied():
    nested = ((1, [2.0, None]), {"a": Pair(torch.ones(1), ()), "b": torch.Size([3, 4])})
    again = filled(nested, iter(leaves(nested)))
    assert str(again) == str(nested)
    assert [type(each) for each in again[1].values()] == [Pair, torch.Size]


def test_what_is_kept_is_remembered_only_while_it_cannot_change():
    plan = analyze(chain(nn.BatchNorm2d, 1), (torch.randn(2, 3, 8, 8),))
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


def test_models_for_the_check_are_the_same_in_every_precision():
    model = chain(nn.BatchNorm2d, 1)
    narrow, wide, again = (
        verification.prepare(model, dtype).state_dict() for dtype in (torch.float32, torch.float64, torch.float64)
    )
    for one, two, three in zip(narrow.values(), wide.values(), again.values(), strict=True):
        assert one.dtype == two.dtype == torch.int64 or (one.dtype, two.dtype) == (torch.float32, torch.float64)
        assert torch.equal(one.to(two.dtype), two)
        assert torch.equal(two, three)
    assert [verification.width(model.to(each)) for each in (torch.float16, torch.float64)] == [
        torch.float32,
        torch.float64,
    ]
    (one,), (two,) = (verification.vary((torch.ones(1, 3, 8, 8),), dtype) for dtype in (torch.float32, torch.float64))
    assert torch.equal(one.double(), two)
    assert len(two.unique()) == two.numel()


def test_tied_weights_stay_tied_in_a_model_for_the_check():
    model = nn.ModuleDict({"embed": nn.Embedding(7, 4), "head": nn.Linear(4, 7, bias=False)})
    model["head"].weight = model["embed"].weight
    copied = verification.prepare(model, torch.float64)
    assert copied["head"].weight is copied["embed"].weight
    assert copied["head"].weight is not model["head"].weight


def test_a_plain_model_is_not_copied_for_its_analysis():
    model, inputs = chain(nn.BatchNorm2d, 1), (torch.ones(1, 3, 8, 8),)
    assert analyze(model, inputs).model is model
    torch.nn.utils.prune.l1_unstructured(model[0], "weight", 0.5)
    assert not is_plain(model)
    masked = analyze(model, inputs).model
    assert masked is not model
    assert is_plain(masked)
