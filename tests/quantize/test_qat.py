"""Quantization-aware training: what is trained is what ships, in any loop."""

from __future__ import annotations

import copy
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor, nn

import torchslim as ts
from tests.support import models, toy
from tests.support.deployment_models import trained_conv
from tests.support.distributed import two_processes
from torchslim.core.step import Context, Engine
from torchslim.errors import QuantizeError, SelectError
from torchslim.quantize import Prepared, Quantize, convert, prepare, sqnr
from torchslim.quantize.fake_quantize import GroupWeights, LearnedGroups, LearnedStep
from torchslim.training.finetune import Finetune


def images(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def ready(model: nn.Module, x: Tensor, **options: Any) -> Prepared:
    prepared = prepare(model, (x,), qat=True, **options)
    prepared.calibrate([(x,)])
    return prepared


class Loose(nn.Module):
    """A batch norm behind no layer, a dropout, and one batch norm behind an addition."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.BatchNorm2d(3)
        self.conv = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.side = nn.Conv2d(3, 8, 1)
        self.after = nn.BatchNorm2d(8)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = torch.relu(self.after(torch.relu(self.norm(self.conv(x))) + self.side(x)))
        return self.head(self.drop(x.mean((2, 3))))


@pytest.mark.slow
@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("make", [trained_conv, Loose])
def test_what_is_evaluated_is_what_ships(make: Any, runtime: str) -> None:
    """Batch norms are folded when the model is converted: the integers must be those that were trained with."""
    x = images(16)
    prepared = ready(make(), x, runtime=runtime)
    optimizer = torch.optim.SGD(prepared.parameters(), lr=0.05)
    for step in range(5):
        prepared.train()
        loss = nn.functional.cross_entropy(prepared(images(16, step)), torch.arange(16) % 4)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    prepared.eval()
    with torch.no_grad():
        trained, shipped = prepared(x), convert(prepared)(x)
    assert torch.equal(prepared(x), trained), "evaluating changes nothing"
    assert sqnr(trained, shipped) > 40
    assert (trained - shipped).abs().median() < 1e-5


def test_negative_and_zero_batch_norm_scales_fold_to_the_same_integers() -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6)).eval()
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([1.0, -1.0, 0.0, 3.0, -0.01, 0.5]))
        model[1].bias.normal_()
        model[1].running_var.uniform_(0.3, 3)
    x = images(8)
    prepared = ready(model, x, scheme="int8-weights").eval()
    assert sqnr(prepared(x), convert(prepared)(x)) > 90


@pytest.mark.slow
def test_train_and_eval_switch_dropouts_and_batch_norms() -> None:
    x = images(16)
    prepared = ready(Loose(), x)
    means = {name: value for name, value in prepared.named_buffers() if "running_mean" in name}
    assert len(means) == 3
    before = {name: value.clone() for name, value in means.items()}
    prepared.eval()
    assert torch.equal(prepared(x), prepared(x))
    assert all(torch.equal(before[name], value) for name, value in means.items())
    prepared.train()
    assert not torch.equal(prepared(x), prepared(x)), "dropout is active"
    assert not any(torch.equal(before[name], value) for name, value in means.items())
    prepared.freeze_norms()
    before = {name: value.clone() for name, value in means.items()}
    prepared(x)
    assert all(torch.equal(before[name], value) for name, value in means.items())


@pytest.mark.slow
def test_a_float_twin_trains_the_same_way() -> None:
    """With the rounding off, a prepared model in training mode is the model in training mode."""
    model = trained_conv().train()
    x = images(8)
    prepared = prepare(model, (x,), qat=True).train()
    for module in prepared.modules():
        if hasattr(module, "fake_quant_enabled"):
            module.disable_fake_quant()
    torch.testing.assert_close(prepared(x), model(x))
    mean = dict(prepared.named_buffers())["program.model.norm.running_mean"]
    torch.testing.assert_close(mean, model.norm.running_mean)


@pytest.mark.slow
def test_ranges_follow_training_data_and_freeze() -> None:
    x = images(16)
    prepared = ready(trained_conv(), x).train()

    def scales() -> list[Tensor]:
        return [value.clone() for name, value in prepared.named_buffers() if name.endswith("scale")]

    first = scales()
    prepared(3 * x)
    second = scales()
    assert any(not torch.equal(a, b) for a, b in zip(first, second, strict=True))
    prepared.eval()
    prepared(9 * x)
    assert all(torch.equal(a, b) for a, b in zip(second, scales(), strict=True)), "nothing is observed in evaluation"
    prepared.train()
    prepared.freeze_ranges()
    prepared(9 * x)
    assert all(torch.equal(a, b) for a, b in zip(second, scales(), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_loop_with_automatic_mixed_precision_trains_on_the_grid(dtype: torch.dtype) -> None:
    """Layers compute in half precision, weights and ranges stay in float32. Costs 3 s each."""
    x = images(8)
    prepared = ready(trained_conv(), x).train()
    before = {name: value.clone() for name, value in prepared.named_parameters()}
    dtypes = {name: value.dtype for name, value in prepared.state_dict().items()}
    optimizer = torch.optim.SGD(prepared.parameters(), lr=0.05)
    scaler = torch.amp.GradScaler("cpu", enabled=dtype == torch.float16)
    for _ in range(3):
        with torch.autocast("cpu", dtype=dtype):
            outputs = prepared(x)
            loss = outputs.float().square().mean()
        assert outputs.dtype == dtype
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    assert {name: value.dtype for name, value in prepared.state_dict().items()} == dtypes
    assert all(bool(torch.isfinite(value).all()) for value in prepared.parameters())
    assert any(not torch.equal(value, before[name]) for name, value in prepared.named_parameters())
    assert sqnr(prepared.eval()(x), convert(prepared)(x)) > 40


@pytest.mark.slow
def test_learned_steps_learn() -> None:
    x = images(16)
    prepared = ready(trained_conv(), x, learned_step=True).train()
    steps = [module for module in prepared.modules() if isinstance(module, LearnedStep)]
    assert len(steps) == 5
    before = [each.scale.detach().clone() for each in steps]
    optimizer = torch.optim.SGD(prepared.parameters(), lr=0.1)
    prepared(x).square().mean().backward()
    optimizer.step()
    assert all(not torch.equal(a, each.scale) for a, each in zip(before, steps, strict=True))
    prepared.eval()
    assert sqnr(prepared(x), convert(prepared)(x)) > 40


@pytest.mark.parametrize("high", [7, 127])
def test_learned_steps_start_no_coarser_than_the_range_needs(high: int) -> None:
    weight = torch.randn(4, 300, generator=torch.Generator().manual_seed(0))
    step = LearnedStep(torch.int8, -high, high, torch.per_channel_symmetric, 0)
    error = (step(weight) - weight).square().mean()
    scale = weight.abs().amax(1, keepdim=True) / high
    nearest = ((weight / scale).round() * scale - weight).square().mean()
    assert error <= 1.01 * nearest


@pytest.mark.slow
def test_steps_of_groups_are_learned_and_are_those_that_ship() -> None:
    x = images(16)
    prepared = ready(trained_conv(), x, learned_step=True, scheme="int4-weights").train()
    groups = [module for module in prepared.modules() if isinstance(module, LearnedGroups)]
    assert len(groups) == 5
    before = [each.scale.detach().clone() for each in groups]
    assert all(bool((each.scale > 0).all()) for each in groups), "they are there before an optimizer looks"
    optimizer = torch.optim.SGD(prepared.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.cross_entropy(prepared(x), torch.arange(16) % 4).backward()
        optimizer.step()
    assert all(not torch.equal(a, each.scale) for a, each in zip(before, groups, strict=True))
    prepared.eval()
    assert sqnr(prepared(x), convert(prepared)(x)) > 60


@pytest.mark.parametrize("axis", [0, 1])
def test_learned_groups_start_as_nearest_and_keep_shorter_last_groups(axis: int) -> None:
    weight = torch.randn(6, 45, generator=torch.Generator().manual_seed(0))
    arguments: Any = (torch.int8, -7, 7, torch.per_channel_symmetric, axis, 32, True)
    learned, plain = LearnedGroups(*arguments), GroupWeights(*arguments)
    torch.testing.assert_close(learned(weight), plain(weight))
    learned(weight).sum().backward()
    assert learned.scale.grad is not None
    assert learned.scale.grad.shape == ((6, 2) if axis == 0 else (45, 1))
    torch.testing.assert_close(learned.rounded(weight), learned(weight))


def test_lsq_gradient_is_that_of_the_paper() -> None:
    """Esser et al. 2020, eq. 3: round(v) - v inside of the range, the bound outside; scaled by g."""
    step = LearnedStep(torch.int8, -7, 7, torch.per_channel_symmetric, 0)
    weight = torch.randn(2, 50, generator=torch.Generator().manual_seed(0))
    step.start(weight)
    with torch.no_grad():
        step.scale.copy_(torch.tensor([0.2, 0.1]))
    step(weight).sum().backward()
    v = weight / step.scale.detach().view(2, 1)
    expected = torch.where(v <= -7, -7.0, torch.where(v >= 7, 7.0, v.round() - v)).sum(1) / (50 * 7) ** 0.5
    torch.testing.assert_close(step.scale.grad, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_state_dicts_load_into_a_fresh_preparation() -> None:
    x = images(16)
    first = ready(trained_conv(), x)
    first.train()(x)
    second = prepare(trained_conv(1), (x,), qat=True)
    second.load_state_dict(first.state_dict())
    assert torch.equal(first.eval()(x), second.eval()(x))


@pytest.mark.slow
@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_no_two_names_of_a_state_dict_share_memory(runtime: str) -> None:
    """Trainers save it as safetensors, which refuses tensors that share memory. Costs 2 s."""
    tokens = torch.arange(32).reshape(4, 8) % models.WORDS
    model = models.Encoder().eval()
    prepared = ready(model, tokens, runtime=runtime)
    state = prepared.state_dict()
    places = [value.untyped_storage().data_ptr() for value in state.values() if value.numel()]
    assert len(set(places)) == len(places)
    other = prepare(models.Encoder(), (tokens,), qat=True, runtime=runtime)
    other.load_state_dict(load(save(state)))
    assert torch.equal(other.eval()(tokens), prepared.eval()(tokens))
    assert torch.equal(convert(other, checks=None)(tokens), convert(prepared, checks=None)(tokens))


@pytest.mark.slow
def test_the_model_stays_as_it_was_and_copies_are_independent() -> None:
    model = trained_conv()
    before = copy.deepcopy(model.state_dict())
    x = images(8)
    prepared = ready(model, x)
    twin = copy.deepcopy(prepared)
    optimizer = torch.optim.SGD(prepared.parameters(), lr=1.0)
    prepared.train()(x).sum().backward()
    optimizer.step()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not torch.equal(prepared.eval()(x), twin.eval()(x))


@pytest.mark.slow
def test_layers_choose_their_schemes() -> None:
    x = images(8)
    layers = {"type:Conv2d": "float", "pointwise": "int8-weights", "head": "int8-dynamic"}
    prepared = prepare(trained_conv(), (x,), layers=layers, runtime="eager")
    bits = {each.layer: (each.action, each.weight_bits, each.activation_bits) for each in prepared.records}
    assert bits == {
        "stem": ("refused", None, None),
        "depthwise": ("refused", None, None),
        "pointwise": ("quantized", 8, None),
        "hidden": ("quantized", 8, 8),
        "head": ("quantized", 8, 8),
    }
    with pytest.raises(SelectError, match="pointwide"):
        prepare(trained_conv(), (x,), layers={"pointwide": "float"})
    with pytest.raises(QuantizeError, match="nothing to quantize"):
        prepare(trained_conv(), (x,), layers={"*": "float"})


@pytest.mark.slow
def test_what_is_not_prepared_is_not_converted() -> None:
    with pytest.raises(QuantizeError, match="convert.*ts.quantize.prepare.*Conv"):
        convert(trained_conv())
    with pytest.raises(QuantizeError, match="prepare it with qat=True"):
        prepare(trained_conv(), (images(4),)).train()


def context(model: nn.Module) -> Context:
    task = toy.task()
    return Context(task=task, teacher=model, example_inputs=(toy.images(4, 0)[0],), engine=Engine(accelerator="cpu"))


@pytest.mark.slow
def test_the_step_trains_and_keeps_zeros() -> None:
    model = toy.model()
    mask = torch.rand(model.conv2.weight.shape, generator=torch.Generator().manual_seed(0)) > 0.5
    with torch.no_grad():
        model.conv2.weight.mul_(mask)
    ctx = context(model)
    ctx = Context(
        task=ctx.task, teacher=ctx.teacher, example_inputs=ctx.example_inputs, engine=ctx.engine,
        masks={"conv2.weight": mask},
    )  # fmt: skip
    outcome = Quantize(mode="qat", train=Finetune(epochs=2, lr=1e-2))(copy.deepcopy(model), ctx)
    assert len(outcome.history) == 2
    program = outcome.model.program
    shaped = [
        value for name, value in program.named_buffers() if value.dtype == torch.int8 and value.shape == mask.shape
    ]
    assert len(shaped) == 1
    assert not shaped[0][~mask].any()
    assert shaped[0][mask].any()


def test_it_distils_by_default() -> None:
    quantize = Quantize(mode="qat")
    assert isinstance(quantize.training(), ts.Distill)
    quantize.check(context(toy.model()))


def _worker(rank: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    prepared = ready(toy.model(), toy.images(8, 0)[0])
    prepared.freeze_norms()
    prepared.freeze_ranges()
    wrapped = nn.parallel.DistributedDataParallel(prepared)
    wrapped.train()
    x, labels = toy.images(8, 1)
    mine = slice(rank * 4, rank * 4 + 4)
    nn.functional.cross_entropy(wrapped(x[mine]), labels[mine]).backward()
    if rank == 0:
        torch.save({name: each.grad for name, each in prepared.named_parameters()}, f"{folder}/grads.pt")
    assert type(convert(wrapped)).__name__ == "QuantizedModule"
    torch.distributed.barrier()  # the store is the first one's: it must not leave before the others
    torch.distributed.destroy_process_group()


@pytest.mark.distributed
def test_two_processes_have_the_gradient_of_one(tmp_path: Any) -> None:
    two_processes(_worker, str(tmp_path))
    prepared = ready(toy.model(), toy.images(8, 0)[0])
    prepared.freeze_norms()
    prepared.freeze_ranges()
    x, labels = toy.images(8, 1)
    nn.functional.cross_entropy(prepared.train()(x), labels).backward()
    joined = torch.load(tmp_path / "grads.pt", weights_only=True)
    for name, each in prepared.named_parameters():
        torch.testing.assert_close(joined[name], each.grad, rtol=1e-5, atol=1e-6)


class Watched(Finetune):
    """Keeps the weights of the prepared model from before and after the training."""

    seen: ClassVar[list[dict[str, Tensor]]] = []

    def fit(self, model: nn.Module, ctx: Context, **options: Any) -> Any:
        self.seen.append({name: each.detach().clone() for name, each in model.named_parameters()})
        report = super().fit(model, ctx, **options)
        self.seen.append({name: each.detach().clone() for name, each in model.named_parameters()})
        return report


@pytest.mark.parametrize("learned_step", [False, True])
def test_learning_rates_are_scaled_by_the_names_and_classes_of_the_users_model(learned_step: bool) -> None:
    task = toy.task()
    train = Watched(epochs=1, lr_scale={"type:Conv2d": 0, "conv2.bias": 1, "bn1": 0})
    step = Quantize("int8", mode="qat", train=train, learned_step=learned_step, checks=None)
    ctx = Context(task=task, teacher=toy.model(), model=toy.model(), example_inputs=task.inputs(task.val[0]))
    step.check(ctx)
    Watched.seen.clear()
    step(toy.model(), ctx)
    before, after = Watched.seen
    frozen = {name.rpartition("model.")[2] for name in before if torch.equal(before[name], after[name])}
    assert frozen == {"conv1.weight", "conv2.weight", "bn1.weight", "bn1.bias"}
    with pytest.raises(SelectError, match="near names: conv2"):
        Quantize("int8", mode="qat", train=Finetune(lr_scale={"conv22": 0})).check(ctx)


def test_a_tied_weight_is_scaled_by_any_of_its_names() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)
            self.two.weight = self.one.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.two(torch.relu(self.one(x)))

    torch.manual_seed(0)
    x = torch.randn(32, 8)
    task = ts.Task(train=[(x, torch.arange(32) % 8)], val=[(x, torch.arange(32) % 8)], metric="accuracy")
    Watched.seen.clear()
    step = Quantize("int8", mode="qat", train=Watched(epochs=1, lr_scale={"two.weight": 0}), checks=None)
    step(Tied(), Context(task=task, teacher=Tied(), example_inputs=(x,)))
    before, after = Watched.seen
    assert [name for name in before if torch.equal(before[name], after[name])] == [
        name for name in before if name.endswith("weight")
    ]


@pytest.mark.slow
def test_averaged_weights_are_trained_and_converted() -> None:
    """The grid is that of the trained weights; the average may not leave it by more than training does."""
    task, outcomes = toy.task(), []
    for average in (None, 0.9):
        train = Finetune(epochs=3, lr=1e-3, average=average, accumulate=2, patience=2)
        ctx = Context(task=task, teacher=toy.model(), example_inputs=task.inputs(task.val[0]))
        outcomes.append(Quantize("int8", mode="qat", train=train)(toy.model(), ctx))
    plain, averaged = (outcome.model(task.val[0][0]) for outcome in outcomes)
    assert not torch.equal(plain, averaged)
    assert float(sqnr(plain, averaged)) > 10
