"""Prepared and quantized models go through pickles and deep copies, as trainers that save whole models do."""

from __future__ import annotations

import copy
import io
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import torchslim as ts
from tests.support.parted import Branching, images, seeded
from torchslim.core.parts import Mounted
from torchslim.quantize import Prepared, QuantizedModule, convert, prepare
from torchslim.quantize.samples import PICKLED, Samples

Through = Callable[[nn.Module], nn.Module]
SHAPE = (8, 3, 8, 8)


class Net(nn.Module):
    """A norm that is folded, an addition on integers, a dropout and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.side, self.drop, self.head = nn.Conv2d(8, 8, 1), nn.Dropout(0.1), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = torch.relu(self.norm(self.stem(x)))
        return {"logits": self.head(self.drop((x + self.side(x)).mean((2, 3))))}


def pickled(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save({"ema": model}, file)
    file.seek(0)
    loaded: nn.Module = torch.load(file, weights_only=False)["ema"]
    return loaded


THROUGH: dict[str, Through] = {"pickled": pickled, "deep-copied": copy.deepcopy}


def inputs(seed: int = 0) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


def ready(**options: Any) -> Prepared:
    prepared = prepare(seeded(Net), (inputs(),), **{"qat": True, **options})
    prepared.calibrate([(inputs(),)])
    return prepared


def train(model: nn.Module, steps: int = 3) -> None:
    torch.manual_seed(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for step in range(steps):
        optimizer.zero_grad()
        model.train()(inputs(step))["logits"].square().mean().backward()
        optimizer.step()
    model.eval()


def equal(one: nn.Module, other: nn.Module, x: Tensor | None = None) -> bool:
    x = inputs(9) if x is None else x
    with torch.no_grad():
        return torch.equal(one(x)["logits"], other(x)["logits"])


@pytest.mark.parametrize("through", THROUGH.values(), ids=THROUGH)
@pytest.mark.parametrize(
    "options",
    [{}, {"learned_step": True}, {"scheme": "int8-dynamic"}, {"scheme": "int4-weights", "learned_step": True}],
    ids=["int8", "learned", "dynamic", "int4"],
)
def test_a_prepared_model_goes_on_training_and_converts_as_the_original(
    through: Through, options: dict[str, Any]
) -> None:
    """Costs 1 s for each."""
    original = ready(**options)
    train(original)
    again = through(original)
    assert isinstance(again, Prepared)
    assert list(again.state_dict()) == list(original.state_dict())
    assert equal(original, again)
    train(original)
    train(again)
    assert equal(original, again)
    one, other = convert(original), convert(again)
    assert equal(one, other)
    assert one.records == other.records
    assert one.evidence is not None
    assert other.evidence is not None
    assert one.evidence.worst == other.evidence.worst


def test_a_model_for_calibration_is_calibrated_after_its_pickle_as_before() -> None:
    original = prepare(seeded(Net), (inputs(),))
    again = pickled(original)
    assert isinstance(again, Prepared)
    for model in (original, again):
        model.calibrate([(inputs(1),), (inputs(2),)])
    assert equal(convert(original), convert(again))


def test_switches_and_trainable_weights_are_kept() -> None:
    original = ready()
    original.freeze_norms()
    original.freeze_ranges()
    original.train()
    name, first = next(iter(original.named_parameters()))
    first.requires_grad_(False)
    again = pickled(original)
    assert isinstance(again, Prepared)
    assert (again.training, again.norms_frozen, again.ranges_frozen) == (True, True, True)
    assert {key for key, weight in again.named_parameters() if not weight.requires_grad} == {name}
    before = {key: value.clone() for key, value in again.named_buffers() if not key.endswith("_enabled")}
    again(inputs(5) * 10)
    after = dict(again.named_buffers())
    assert all(torch.equal(value, after[key]) for key, value in before.items())


@pytest.mark.parametrize("through", THROUGH.values(), ids=THROUGH)
def test_a_quantized_model_keeps_its_outputs_and_deploys_as_the_original(through: Through) -> None:
    """Costs 2 s for each."""
    original = convert(ready().eval())
    again = through(original)
    assert isinstance(again, QuantizedModule)
    assert equal(original, again)
    assert again.records == original.records
    deployed = [ts.deploy(model, (inputs(),), runtime="eager") for model in (original, again)]
    assert torch.equal(deployed[0](inputs(3))["logits"], deployed[1](inputs(3))["logits"])
    assert deployed[1].quantized


@pytest.mark.parametrize("through", THROUGH.values(), ids=THROUGH)
def test_parts_go_on_training_the_weights_that_they_share(through: Through) -> None:
    """Costs 2 s for each."""
    model = seeded(Branching)
    model.backbone.f = -1  # type: ignore[assignment]
    x = images(8)[0]
    original = prepare(model, (x,), part=["backbone", "neck"], qat=True)
    again = through(original)
    outputs = []
    for whole in (original, again):
        whole.train()
        optimizer = torch.optim.SGD(whole.parameters(), lr=0.05)
        for _ in range(2):
            optimizer.zero_grad()
            whole(x).square().mean().backward()
            optimizer.step()
        outputs.append(whole.eval()(x))
    assert torch.equal(*outputs)
    mounted = again.get_submodule("backbone")
    assert isinstance(mounted, Mounted)
    assert mounted.f == -1, "attributes of the part"
    own = {id(weight) for weight in mounted.inner.parameters()}  # type: ignore[attr-defined]
    shared = [weight for weight in mounted.part.parameters() if id(weight) in own]
    assert len(shared) == len(list(mounted.part.parameters()))
    assert again.get_submodule("high").weight is again.get_submodule("low").weight
    converted = [convert(whole) for whole in (original, again)]
    assert torch.equal(converted[0](x), converted[1](x))
    assert torch.equal(through(converted[1])(x), converted[0](x))


LOADED = """
import sys, torch
from torch.testing import assert_close
saved = torch.load(sys.argv[1], weights_only=False)
with torch.no_grad():
    for name, (model, x, expected) in saved.items():
        assert_close(model(x), expected, rtol=0, atol=0)
        if name == "prepared":
            model.train()(x)["logits"].sum()
print(*saved)
"""


@pytest.mark.slow
def test_another_process_computes_the_same(tmp_path: Path) -> None:
    """Costs 8 s."""
    x, trained = inputs(3), ready()
    train(trained)
    part = images(8)[0]
    whole = prepare(seeded(Branching), (part,), part=["backbone", "neck"], qat=True)
    whole.train()(part)
    models = {"prepared": (trained.eval(), x), "quantized": (convert(trained), x), "parts": (whole.eval(), part),
              "quantized parts": (convert(whole), part)}  # fmt: skip
    with torch.no_grad():
        torch.save({name: (model, x, model(x)) for name, (model, x) in models.items()}, tmp_path / "models.pt")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", LOADED, str(tmp_path / "models.pt")],
        env=environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.stdout.split() == " ".join(models).split(), done.stderr


@given(weight=st.floats(0.05, 0.95), scale=st.floats(0.1, 10), shift=st.floats(-3, 3))
@settings(max_examples=10, deadline=None)
def test_an_average_of_floating_point_buffers_rounds_as_it_converts(weight: float, scale: float, shift: float) -> None:
    """As trainers average whole models: integer buffers, such as zero points, stay those of the first."""
    original = averaged_from()
    average, other = copy.deepcopy(original), copy.deepcopy(original)
    held = average.state_dict()
    other.train()
    for seed in range(3):
        other(inputs(seed) * scale + shift)
    new = other.state_dict()
    for name, value in held.items():
        if value.is_floating_point():
            value.mul_(weight).add_(new[name], alpha=1 - weight)
    average.eval()
    assert ts.quantize.sqnr(convert(average, checks=None)(inputs(7)), average(inputs(7))) > 60


def averaged_from(made: list[Prepared] = []) -> Prepared:  # noqa: B006 - prepared once for all examples
    if not made:
        made.append(ready())
    return made[0]


def test_the_tensors_of_ranges_stay_the_same_objects() -> None:
    """Averages of models hold the tensors of a state dict from the first step on."""
    model = ready()
    held = model.state_dict()
    train(model)
    now = model.state_dict()
    assert all(now[name].data_ptr() == value.data_ptr() for name, value in held.items())


def test_ranges_stay_in_float32_where_a_trainer_stores_float16() -> None:
    original = ready()
    train(original)
    model = copy.deepcopy(original).half()
    observed = {name: value for name, value in original.named_buffers() if "post_process" in name}
    stored = dict(model.named_buffers())
    assert observed
    assert all(torch.equal(stored[name], value) for name, value in observed.items())
    assert next(model.parameters()).dtype == torch.float16
    again = pickled(model).float()
    expected, value = original(inputs(4))["logits"], again(inputs(4))["logits"]
    assert ts.quantize.sqnr(expected, value) > 30


def test_a_pickle_holds_a_few_megabytes_of_samples() -> None:
    samples = Samples([0])
    batch = torch.randn(16, 3, 256, 256)
    for _ in range(3):
        samples.add([batch])
    assert sum(leaf.nbytes for run in samples.batches for leaf in run) > 2 * PICKLED
    state = samples.__getstate__()
    assert isinstance(state, dict)
    kept = state["batches"]
    assert 0.5 * PICKLED < sum(leaf.untyped_storage().nbytes() for run in kept for leaf in run) <= PICKLED
    assert len(kept) == 2
    assert torch.equal(kept[0][0], batch[: len(kept[0][0])])
