"""The training loop, distillation and the task: one loop, exact losses, runs that resume."""

from __future__ import annotations

import resource
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import torchslim as ts
from tests import toy
from torchslim.distill import kl_divergence
from torchslim.errors import DistillError, TaskError, TrainError
from torchslim.isolation import preserved_globals
from torchslim.optimizer import OptimizerSettings
from torchslim.steps import fingerprint
from torchslim.task import predictor
from torchslim.training import Hook, LabelLoss, Loop


def train(model: nn.Module, task: ts.Task, **options: Any) -> Any:
    settings = OptimizerSettings(optimizer="sgd", lr=0.05)
    return ts.fit(
        model, LabelLoss(task), task.train, **{"epochs": 3, "settings": settings, "evaluate": task} | options
    )


def own_generator() -> ts.Task:
    data = TensorDataset(*toy.images(96, 1))
    loader = DataLoader(data, batch_size=16, shuffle=True, generator=torch.Generator().manual_seed(5))
    return replace(toy.task(), train=loader)


class Unsized:
    """A loader that does not know its length."""

    def __iter__(self) -> Any:
        return iter([toy.images(16, seed) for seed in range(4)])


@pytest.mark.parametrize("make", [toy.task, own_generator, lambda: replace(toy.task(), train=Unsized())])
@pytest.mark.parametrize("stop", [1, 2])
def test_a_resumed_training_ends_with_the_same_weights(make: Any, stop: int, tmp_path: Path) -> None:
    class Stop(Hook):
        def on_step(self, loop: Loop) -> None:
            if loop.epoch == stop and loop.step_in_epoch == 2:
                raise KeyboardInterrupt

    whole, broken, task = toy.model(), toy.model(), make()
    report = train(whole, task)
    with pytest.raises(KeyboardInterrupt):
        train(broken, task, hooks=[Stop()], state=tmp_path / "c.ckpt")
    resumed = toy.model()
    again = train(resumed, make(), state=tmp_path / "c.ckpt")
    assert fingerprint(resumed.state_dict()) == fingerprint(whole.state_dict())
    assert again.history == report.history
    assert again.best_epoch == report.best_epoch


def test_training_leaves_the_process_and_the_loader_as_they_were() -> None:
    task, model = own_generator(), toy.model()
    model.bn1.eval()
    before = (
        torch.get_rng_state().tolist(),
        task.train.generator.get_state().tolist(),
        np.random.get_state()[1].tolist(),
    )
    train(model, task)
    after = (
        torch.get_rng_state().tolist(),
        task.train.generator.get_state().tolist(),
        np.random.get_state()[1].tolist(),
    )
    assert before == after
    assert not model.bn1.training
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_best_epoch_is_kept_or_the_last() -> None:
    values = iter([0.2, 0.9, 0.5])
    seen: list[Tensor] = []

    def metric(predict: Any, batches: Any) -> float:
        seen.append(model.head.weight.detach().clone())
        return next(values)

    task, model = replace(toy.task(), metric=metric), toy.model()
    report = train(model, task)
    assert (report.best_epoch, report.best_value) == (2, 0.9)
    assert torch.equal(model.head.weight, seen[1])
    other = toy.model()
    train(other, toy.task(), evaluate=None)
    assert not torch.equal(other.head.weight, model.head.weight)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_masked_weights_and_what_the_optimizer_knows_of_them_stay_zero(optimizer: str) -> None:
    model, mask = toy.model(), torch.rand(8, 8, 3, 3) < 0.5
    kept: dict[str, Any] = {}

    class Look(Hook):
        def on_epoch(self, loop: Loop) -> None:
            kept["state"] = loop.optimizer.state[loop.model.conv2.weight]

    settings = OptimizerSettings(optimizer=optimizer, lr=0.01, weight_decay=0.1, clip_norm=1.0)
    train(model, toy.task(), masks={"conv2.weight": mask}, hooks=[Look()], settings=settings)
    assert bool((model.conv2.weight[~mask] == 0).all())
    assert not bool((model.conv2.weight[mask] == 0).any())
    for value in kept["state"].values():
        if value.shape == mask.shape:
            assert bool((value[~mask] == 0).all())


def test_masks_that_fit_no_parameter_are_refused() -> None:
    with pytest.raises(TrainError, match="masks name parameters that the model does not have: nothing"):
        train(toy.model(), toy.task(), masks={"nothing": torch.ones(1, dtype=torch.bool)})
    with pytest.raises(TrainError, match="the mask of 'head.weight' must be boolean"):
        train(toy.model(), toy.task(), masks={"head.weight": torch.ones(1)})


def test_a_loss_that_is_not_finite_names_its_place_and_keeps_the_checkpoint(tmp_path: Path) -> None:
    state, model = tmp_path / "c.ckpt", toy.model()

    class Poison(Hook):
        def penalty(self, loop: Loop) -> Tensor | None:
            late = loop.epoch == 1 and loop.step_in_epoch == 1
            return torch.tensor(float("nan")) if late else torch.tensor(0.5)

    with pytest.raises(
        TrainError, match=r"the loss became nan in 'fit', epoch 2, batch 2; the last finite loss was \d"
    ):
        train(model, toy.task(), hooks=[Poison()], state=state)
    saved = torch.load(state, weights_only=True)
    assert saved["epoch"] == 1
    assert saved["history"][0]["loss_penalty"] == pytest.approx(0.5)


def test_a_damaged_checkpoint_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "c.ckpt").write_bytes(b"junk")
    with pytest.raises(TrainError, match="cannot be resumed from.*delete it to start over"):
        train(toy.model(), toy.task(), state=tmp_path / "c.ckpt")


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
from torchslim.errors import StorageError
from torchslim.files import write_bytes
path = Path(sys.argv[1])
write_bytes(path, b"old")
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    write_bytes(path, b"new" * 10_000)
except StorageError as error:
    print(error)
"""


def test_a_full_disk_keeps_what_was_there(tmp_path: Path) -> None:
    assert resource.RLIMIT_FSIZE >= 0
    path = tmp_path / "c.ckpt"
    done = subprocess.run([sys.executable, "-c", FULL_DISK, path], capture_output=True, text=True, check=True)
    assert f"cannot write {path}" in done.stdout
    assert path.read_bytes() == b"old"
    assert [each.name for each in tmp_path.iterdir()] == ["c.ckpt"]


def momentum_free(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.01)


@pytest.mark.parametrize("optimizer", [momentum_free, "tests.test_training:momentum_free"])
def test_an_optimizer_of_the_users_own(optimizer: Any) -> None:
    model, before = toy.model(), toy.model()
    train(model, toy.task(), settings=OptimizerSettings(optimizer=optimizer), epochs=1)
    assert not torch.equal(model.head.weight, before.head.weight)


@given(st.floats(0, 1), st.floats(0, 0.9), st.sampled_from(["cosine", "constant"]))
def test_the_learning_rate_stays_between_zero_and_its_top(
    progress: float, warmup: float, schedule: Any
) -> None:
    settings = OptimizerSettings(schedule=schedule, warmup=warmup)
    assert 0 <= settings.factor(progress) <= 1
    assert settings.factor(warmup) == pytest.approx(1)


@pytest.mark.parametrize(
    ("field", "value"),
    [("epochs", 0), ("lr", 0.0), ("lr", float("nan")), ("momentum", 1.0), ("weight_decay", -1.0), ("warmup", 1.0),
     ("clip_norm", 0.0), ("optimizer", "lion"), ("schedule", "step"), ("keep", "first")],
)  # fmt: skip
def test_training_fields_are_checked(field: str, value: Any) -> None:
    with pytest.raises(TrainError, match=f"{field} must be"):
        ts.Finetune(**{field: value})


def test_nothing_trainable_is_an_error() -> None:
    model = toy.model().requires_grad_(False)
    with pytest.raises(TrainError, match="no trainable parameter"):
        train(model, toy.task())


# distillation

LOGITS = st.integers(0, 2**31 - 1).map(
    lambda seed: torch.randn(2, 5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 3
)


def numpy_kd(student: Any, teacher: Any, target: Any, temperature: float, alpha: float) -> float:
    def log_softmax(x: Any) -> Any:
        x = x - x.max(1, keepdims=True)
        return x - np.log(np.exp(x).sum(1, keepdims=True))

    s, t = log_softmax(student / temperature), log_softmax(teacher / temperature)
    soft = (np.exp(t) * (t - s)).sum(1).mean() * temperature**2
    hard = -log_softmax(student)[np.arange(len(target)), target].mean()
    return float((1 - alpha) * hard + alpha * soft)


@given(LOGITS, st.floats(0.5, 10), st.floats(0, 1))
def test_kd_is_the_papers_formula(logits: Tensor, temperature: float, alpha: float) -> None:
    student, teacher = logits
    target = torch.tensor([0, 6, 3, 3, 1])
    expected = numpy_kd(student.numpy(), teacher.numpy(), target.numpy(), temperature, alpha)
    assert ts.KD(temperature=temperature, alpha=alpha)(student, teacher, target).item() == pytest.approx(
        expected
    )
    order = torch.randperm(5)
    shuffled = ts.KD(temperature=temperature, alpha=alpha)(student[order], teacher[order], target[order])
    assert shuffled.item() == pytest.approx(expected)


def test_kd_by_hand() -> None:
    # one sample, two classes: teacher (3/4, 1/4), student (1/2, 1/2): KL = log 2 + 3/4 log 3/4 + 1/4 log 1/4
    student, teacher = torch.zeros(1, 2), torch.tensor([[3.0, 1.0]]).log()
    expected = np.log(2) + 0.75 * np.log(0.75) + 0.25 * np.log(0.25)
    assert kl_divergence(student, teacher).item() == pytest.approx(expected)


@given(LOGITS)
def test_kd_is_zero_at_the_teacher_and_sends_it_no_gradient(logits: Tensor) -> None:
    assert ts.KD(alpha=1.0)(logits[0], logits[0]).item() == pytest.approx(0, abs=1e-12)
    teacher = logits[1].clone().requires_grad_()
    student = logits[0].clone().requires_grad_()
    ts.KD(alpha=1.0)(student, teacher).backward()
    assert teacher.grad is None
    assert student.grad is not None


def test_kd_gradients_and_half_precision() -> None:
    student = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    teacher, target = torch.randn(3, 4, dtype=torch.float64), torch.tensor([0, 1, 2])
    assert torch.autograd.gradcheck(lambda s: ts.KD()(s, teacher, target), (student,))
    assert torch.isfinite(ts.KD()(student.bfloat16() * 50, teacher.bfloat16() * 50, target))


def test_kd_refuses_what_cannot_be() -> None:
    for fields in (
        {"temperature": 0.0},
        {"temperature": float("nan")},
        {"alpha": -0.1},
        {"alpha": float("nan")},
    ):
        with pytest.raises(DistillError, match="must be"):
            ts.KD(**fields)
    with pytest.raises(DistillError, match="set alpha=1"):
        ts.KD(alpha=0.5)(torch.zeros(1, 2), torch.zeros(1, 2), None)
    with pytest.raises(DistillError, match="differ in shape"):
        ts.KD()(torch.zeros(1, 2), torch.zeros(1, 3), torch.zeros(1).long())
    with pytest.raises(DistillError, match="label_weight must be"):
        ts.Distill(label_weight=-1)
    with pytest.raises(DistillError, match="response 'kl' is not known; one of kd"):
        ts.compress(toy.model(), toy.task(), [ts.Distill(response="kl")], runtime="eager")


def scaled_mse(student: Tensor, teacher: Tensor, target: Tensor | None) -> Tensor:
    return (student - teacher).square().mean()


@pytest.mark.parametrize(
    ("step", "label_weight"),
    [(ts.Distill(), 0.1), (ts.Distill(response=ts.KD(alpha=0.25)), 0.75), (ts.Distill(label_weight=2.0), 2.0),
     (ts.Distill(response=scaled_mse), 0.0), (ts.Distill(response="tests.test_training:scaled_mse", label_weight=0.5), 0.5)],
)  # fmt: skip
def test_the_label_loss_counts_once_with_its_weight(step: ts.Distill, label_weight: float) -> None:
    task, student, teacher = toy.task(), toy.model(), toy.model()
    nn.init.normal_(teacher.head.weight)
    teacher.eval()
    state = fingerprint(teacher.state_dict())
    batch = toy.images(16, 4)
    ctx = ts.Context(task=task, teacher=teacher.train(), example_inputs=(batch[0],))
    parts = step.objective(ctx)(student, batch)
    with torch.no_grad():
        ours, theirs = student(batch[0]), predictor(teacher)(batch[0])
    label = nn.functional.cross_entropy(ours, batch[1])
    response = (
        scaled_mse(ours, theirs, None)
        if step.response not in (ts.KD(), ts.KD(alpha=0.25))
        else step.response.soft(ours, theirs)
    )
    expected = label_weight * label + response
    assert sum(parts.values()).item() == pytest.approx(expected.item(), rel=1e-4)
    sum(parts.values()).backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert fingerprint(teacher.state_dict()) == state


# the task


@dataclass
class Output:
    logits: Tensor
    loss: Tensor | None = None


def test_batches_and_outputs_are_read_by_their_kind() -> None:
    x, mask, y = torch.randn(2, 3), torch.ones(2), torch.tensor([0, 1])
    task = ts.Task(val=[(x, y)], metric="accuracy")
    assert task.inputs((x, y))[0] is x
    assert task.inputs({"x": x, "attention_mask": mask, "labels": y}).keys() == {"x", "attention_mask"}
    assert task.target({"x": x, "labels": y}) is y
    assert task.target(x) is None
    assert task.mask({"attention_mask": mask}) is mask
    for outputs in (x, (x, y), {"logits": x}, Output(x), SimpleNamespace(logits=x)):
        assert task.logits(outputs) is x
    with pytest.raises(TaskError, match="no logits in an output of type int"):
        task.logits(3)


def test_ready_metrics_equal_their_definition() -> None:
    logits, labels = torch.randn(40, 5), torch.randint(5, (40,))
    batches = [(logits[:30], labels[:30]), (logits[30:], labels[30:])]
    task = ts.Task(val=batches, metric="accuracy")
    assert task.evaluate(lambda x: x) == pytest.approx(
        (logits.argmax(1) == labels).float().mean().item() * 100
    )
    tokens, words = torch.randn(2, 6, 5), torch.randint(5, (2, 6))
    words[:, 3:] = -100
    expected = (tokens.argmax(-1) == words)[:, :3].float().mean().item() * 100
    assert ts.Task(val=[(tokens, words)], metric="accuracy").evaluate(lambda x: x) == pytest.approx(expected)
    loss = ts.Task(val=[(tokens, words)], metric="accuracy").compute_loss(tokens, (tokens, words))
    assert loss.item() == pytest.approx(
        nn.functional.cross_entropy(tokens[:, :3].flatten(0, 1), words[:, :3].flatten()).item()
    )
    errors = ts.Task(val=[(logits[:, :1], labels.float())], metric="mae").evaluate(lambda x: x)
    assert errors == pytest.approx((logits[:, 0] - labels).abs().mean().item())
    assert not ts.Task(val=[1], metric="mae").as_metric().higher_is_better


class Counting:
    """The three methods of a torchmetrics.Metric."""

    higher_is_better = False

    def reset(self) -> None:
        self.count = 0

    def update(self, preds: Tensor, target: Tensor) -> None:
        self.count += len(target)

    def compute(self) -> Tensor:
        return torch.tensor(self.count)


def test_a_torchmetrics_metric_is_taken_as_it_is() -> None:
    task = replace(toy.task(), metric=Counting())
    assert task.evaluate(predictor(toy.model())) == 64
    assert not task.as_metric().higher_is_better


def test_a_task_that_cannot_work_says_so() -> None:
    with pytest.raises(TaskError, match="metric 'acuracy' is not known; one of accuracy"):
        ts.Task(val=[1], metric="acuracy")
    with pytest.raises(TaskError, match="metric must be a name"):
        ts.Task(val=[1], metric=3)
    with pytest.raises(TaskError, match="val is None"):
        ts.Task(val=None, metric="accuracy")
    with pytest.raises(TaskError, match="train must be an iterable of batches, got int"):
        ts.Task(val=[1], train=3, metric="accuracy")
    with pytest.raises(TaskError, match="got str"):
        ts.Task(val=[1], metric=lambda predict, batches: "good").evaluate(len)
    with pytest.raises(TaskError, match="do not fit labels"):
        ts.Task(val=[1], metric="accuracy").compute_loss(torch.zeros(2, 3), (0, torch.zeros(2, 2).long()))
    assert len(toy.task().calibration_batches(samples=20)) == 2


def test_globals_survive_whatever_happens_inside() -> None:
    state = torch.get_rng_state()
    with pytest.raises(RuntimeError), preserved_globals(1):
        torch.set_default_dtype(torch.float64)
        torch.set_grad_enabled(False)
        torch.rand(3)
        raise RuntimeError
    assert torch.get_default_dtype() == torch.float32
    assert torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), state)
