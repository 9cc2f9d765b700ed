"""Calls of parts: the inputs that the whole model gives them, as they were when it did."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

import torchslim as ts
from tests.support.parted import Branching, Cache, Translator, generation_task, images, seeded, sentences
from torchslim.core import part_calls
from torchslim.core.batches import predictor
from torchslim.core.part_calls import (
    Calls,
    examples_of_part,
    first_samples,
    recorded,
    recorded_calls,
    recording,
)
from torchslim.core.parts import signature_of
from torchslim.core.tensor_objects import holds_objects, tensors_in, unpacked
from torchslim.core.trees import tensors
from torchslim.errors import TaskError


class InPlace(nn.Module):
    """Changes the argument of its part after the call."""

    def __init__(self) -> None:
        super().__init__()
        self.part = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        y = self.part(x)
        x.zero_()
        return x + y


class Aside(nn.Module):
    """Uses a weight of a submodule that it never calls."""

    def __init__(self) -> None:
        super().__init__()
        self.part = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.part.weight


def test_a_call_is_recorded_as_it_was() -> None:
    x = torch.randn(2, 3)
    (call,) = recorded_calls(InPlace(), ["part"], [(x,)])["part"]
    assert isinstance(call, tuple)
    assert torch.equal(call[0], x)


def test_recorded_inputs_give_the_outputs_that_the_model_saw() -> None:
    model = seeded(Branching)
    x, _ = images(3)
    calls = recorded_calls(model, ["backbone", "neck"], [(x,)])
    assert torch.equal(calls["backbone"][0][0], x)
    assert torch.equal(calls["neck"][0][0], model.backbone(x))
    assert not any(tensor.requires_grad for tensor in tensors(calls["neck"][0]))


def test_the_model_is_as_before_after_a_recording() -> None:
    model = seeded(Branching).train()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ZeroDivisionError), recording(model, ["backbone"]):
        _ = 1 / 0
    recorded_calls(model, ["backbone"], [images(3)[:1]])
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert all(module.training for module in model.modules())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_a_cache_is_recorded_at_every_step() -> None:
    model = seeded(Translator)
    calls = recorded_calls(model, ["decoder"], [{"method": "generate", "args": sentences(2, 5)[:1]}])["decoder"]
    lengths = [
        len(tensors_in(call["cache"])) and next(iter(tensors_in(call["cache"]).values())).shape[1] for call in calls
    ]
    assert lengths == list(range(len(calls)))
    assert len(calls) > 2
    own = [id(tensor) for call in calls for tensor in tensors(unpacked(call))]
    assert len(set(own)) == len(own), "no two calls share a tensor"


def test_the_examples_of_a_decoder_begin_with_its_frequent_call() -> None:
    model = seeded(Translator)
    inputs = [{"method": "generate", "args": sentences(count, length)[:1]} for count, length in ((2, 5), (3, 7))]
    own = examples_of_part(recorded_calls(model, ["decoder"], inputs)["decoder"])
    assert [bool(tensors_in(example["cache"])) for example in own] == [True] * (len(own) - 1) + [False]
    assert len(own) <= part_calls.EXAMPLES + 1
    lengths = {tuple(tensors_in(example["cache"])[".keys[0]"].shape[:2]) for example in own[:-1]}
    assert {1, 4} <= {length for _, length in lengths}, "the shortest and the longest cache"


def test_the_metric_decides_which_calls_are_seen() -> None:
    calls = recorded(seeded(Translator), generation_task(), ["decoder"], [sentences(2, 5)])["decoder"]
    assert holds_objects(calls)
    assert len(calls) == 5, "the steps of one generation"


def test_a_metric_that_fails_or_calls_nothing_leaves_the_inputs_of_batches() -> None:
    def fails(predict: Any, batches: Any) -> float:
        raise ValueError("needs all the data")

    model = seeded(Branching)
    for metric in (fails, lambda predict, batches: 0.0):
        own = ts.Task(val=[images(4)], metric=metric)
        (call,) = recorded(model, own, ["backbone"], [images(4)])["backbone"]
        assert torch.equal(call[0], images(4)[0])


def test_a_part_that_is_never_called_is_an_error_that_names_it() -> None:
    with pytest.raises(TaskError, match="'part'.*never called"):
        recorded_calls(Aside(), ["part"], [(torch.ones(2, 3),)])

    def fails(predict: Any, batches: Any) -> float:
        raise ValueError("needs all the data")

    own = ts.Task(val=[(torch.ones(2, 3), torch.ones(2))], metric=fails)
    with pytest.raises(TaskError, match="'part'.*never called.*ValueError.*needs all the data"):
        recorded(Aside(), own, ["part"], [(torch.ones(2, 3), torch.ones(2))])


def test_of_very_many_calls_a_seeded_sample_is_kept() -> None:
    def sample() -> list[float]:
        calls = Calls(signature_of(nn.ReLU()))
        for number in range(500):
            calls.add((torch.tensor([float(number)]),), {})
        assert calls.count == 500
        return [float(call[0]) for call in calls.inputs]

    with mock.patch.object(part_calls, "MOST_CALLS", 20):
        one, other = sample(), sample()
    assert one == other
    assert len(set(one)) == 20
    assert max(one) > 250, "late calls are kept too"


def test_first_samples_hold_enough() -> None:
    calls = [(torch.ones(3, 2),)] * 5
    assert len(first_samples(calls, 7)) == 3
    assert first_samples(calls, 100) == calls
    assert len(examples_of_part([(torch.ones(count, 2),) for count in range(1, 30)])) == part_calls.EXAMPLES


def test_methods_of_a_predictor_run_in_eval_mode_without_gradients() -> None:
    class Model(nn.Module):
        size = 3

        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 2)

        def generate(self, x: Tensor) -> tuple[bool, Tensor]:
            return self.training, self.layer(x)

    model = Model().train()
    predict: Any = predictor(model)
    training, outputs = predict.generate(torch.ones(1, 2))
    assert not training
    assert not outputs.requires_grad
    assert predict.size == 3
    assert model.training
    with pytest.raises(AttributeError):
        _ = predict.nothing


def test_tokens_shared_by_a_cache_and_its_copy_are_not() -> None:
    cache = Cache()
    cache.add(0, torch.ones(1, 1, 2), torch.ones(1, 1, 2))
    part = nn.Module()
    part.forward = lambda cache: cache  # type: ignore[method-assign]
    calls = Calls(signature_of(part))
    calls.add((cache,), {})
    cache.keys[0].zero_()
    assert bool(calls.inputs[0]["cache"].keys[0].eq(1).all())


def test_a_method_that_does_not_exist_is_named() -> None:
    with pytest.raises(TaskError, match="'generat'.*Translator.*generate"):
        recorded_calls(seeded(Translator), ["decoder"], [{"method": "generat", "args": sentences(2, 5)[:1]}])
