"""A LightningModule as a task: the loss is its training_step's, the metric is what its Trainer shows."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import torchslim as ts
from torchslim.core.batches import predictor
from torchslim.errors import TaskError

pl = pytest.importorskip("lightning.pytorch")
torchmetrics = pytest.importorskip("torchmetrics")

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def pictures(count: int, seed: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (count,), generator=generator)
    images = torch.randn(count, 3, 8, 8, generator=generator) + labels[:, None, None, None]
    return TensorDataset(images, labels)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 3),
    )


class Data(pl.LightningDataModule):
    """Loaders that exist after `setup` alone; the last batch is smaller than the others."""

    def prepare_data(self) -> None:
        self.prepared = True

    def setup(self, stage: str) -> None:
        assert self.prepared
        self.sets = {"train": pictures(48, 0), "val": pictures(20, 1)}

    def train_dataloader(self) -> Any:
        return DataLoader(self.sets["train"], batch_size=16, shuffle=True)

    def val_dataloader(self) -> Any:
        return DataLoader(self.sets["val"], batch_size=16)


class Whole(pl.LightningModule):
    """The module itself is the model; it scales its images, and logs in every way that there is."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net()
        self.accuracy = torchmetrics.classification.MulticlassAccuracy(3, average="micro")
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        loss = nn.functional.cross_entropy(self(2 * x), y, label_smoothing=0.1)
        self.log("train_loss", loss, prog_bar=True)
        return {"loss": loss}

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        logits = self(2 * x)
        self.accuracy(logits, y)
        self.log("val_acc", self.accuracy)
        self.log_dict({"val_loss": nn.functional.cross_entropy(logits, y), "most": logits.max()}, batch_size=len(x))
        self.log("sum", logits.sum(), reduce_fx="sum")
        self.log("max", logits.max(), reduce_fx=torch.max)
        self.seen.append(logits.argmax(1) == y)
        return {"batch_acc": (logits.argmax(1) == y).float().mean()}

    def on_validation_epoch_end(self) -> None:
        self.log("epoch_acc", torch.cat(self.seen).float().mean())
        self.seen.clear()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Part(Whole):
    """Only the attribute `net` is called."""

    def training_step(self, batch: Any) -> Any:  # type: ignore[override]
        x, y = batch
        return nn.functional.cross_entropy(self.net(x), y)

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        self.log("val_acc", (self.net(batch[0]).argmax(1) == batch[1]).float().mean())

    def on_validation_epoch_end(self) -> None:
        self.seen.clear()


NAMES = ("val_acc", "val_loss", "most", "sum", "max", "epoch_acc")


def test_a_logged_metric_is_the_one_that_a_trainer_shows() -> None:
    """Costs 1 s."""
    module = Whole()
    trainer = pl.Trainer(
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False
    )
    [shown] = trainer.validate(module, datamodule=Data(), verbose=False)
    for name in NAMES:
        task = ts.Task.from_lightning(module, Data(), metric=name)
        for _ in range(2):
            assert task.evaluate(predictor(module)) == pytest.approx(shown[name], rel=1e-5), name
        assert task.as_metric().higher_is_better is (name != "val_loss")
    returned = ts.Task.from_lightning(module, Data(), metric="batch_acc", higher_is_better=True)
    assert returned.evaluate(predictor(module)) == pytest.approx(shown["val_acc"])


def test_the_loss_is_that_of_training_step_with_gradients_in_the_given_model() -> None:
    module = Whole()
    task = ts.Task.from_lightning(module, Data(), metric="val_acc")
    other = copy.deepcopy(module)
    with torch.no_grad():
        other.net[0].weight.mul_(0.5)
    batch = next(iter(task.train))  # type: ignore[arg-type]
    expected = other.training_step(batch, 0)["loss"]
    expected.backward()
    gradients = {name: weight.grad.clone() for name, weight in other.named_parameters()}
    other.zero_grad()
    loss = task.compute_loss(task.forward(other, batch), batch)
    assert loss is not None
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-6)
    for name, weight in other.named_parameters():
        torch.testing.assert_close(weight.grad, gradients[name])
    assert all(weight.grad is None for weight in module.parameters())
    assert torch.equal(task.inputs(batch)[0], 2 * batch[0])


def test_making_a_task_changes_neither_the_module_nor_the_random_state() -> None:
    module = Whole()
    before, state = copy.deepcopy(module.state_dict()), torch.random.get_rng_state()
    task = ts.Task.from_lightning(module, Data(), metric="val_acc")
    assert torch.equal(torch.random.get_rng_state(), state)
    task.evaluate(predictor(module))
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert module.seen == []
    assert "log" not in vars(module)


@pytest.mark.slow
@pytest.mark.parametrize("path", ["", "net"])
def test_a_run_prunes_distills_and_quantizes(path: str, tmp_path: Any) -> None:
    """Costs 4 s."""
    module = Whole() if not path else Part()
    task = ts.Task.from_lightning(module, Data(), metric="val_acc", model=path)
    steps = [
        ts.Prune(sparsity=0.3, pattern="channel", round_to=1, min_channels=2),
        ts.Finetune(epochs=1, lr=0.01),
        ts.Distill(epochs=1, lr=0.01),
        ts.Quantize("int8"),
    ]
    result = ts.compress(module.get_submodule(path), task, steps, threads=1)
    first, *_, last = result.run["rows"]
    assert last["parameters"]["value"] < first["parameters"]["value"]
    assert last["metric"]["val"]["value"] == pytest.approx(task.evaluate(result.deployed))
    assert any(layer["action"] == "quantized" for row in result.run["rows"] for layer in row["layers"])


def test_training_leaves_no_reference_to_the_loop_in_the_module() -> None:
    """Lightning Fabric keeps itself and the optimizer in a LightningModule, which then cannot be copied."""
    module = Whole()
    task = ts.Task.from_lightning(module, Data(), metric="val_acc")

    def objective(model: nn.Module, batch: Any) -> dict[str, Tensor]:
        loss = task.compute_loss(task.forward(model, batch), batch)
        assert loss is not None
        return {"label": loss}

    ts.fit(module, task.train or (), objective, epochs=1)
    assert (module._fabric, module._fabric_optimizers) == (None, [])
    copy.deepcopy(module)


@pytest.mark.parametrize("library", ["lightning.pytorch", "pytorch_lightning"])
def test_both_packages_will_do(library: str) -> None:
    package = pytest.importorskip(library)
    module = type("Own", (package.LightningModule,), {
        "training_step": Part.training_step, "validation_step": Part.validation_step, "forward": Whole.forward,
    })()  # fmt: skip
    module.net = net()
    data = type("OwnData", (package.LightningDataModule,), {
        name: vars(Data)[name] for name in ("prepare_data", "setup", "train_dataloader", "val_dataloader")
    })()  # fmt: skip
    task = ts.Task.from_lightning(module, data, metric="val_acc", model="net")
    assert task.test is None
    assert 0 <= task.evaluate(predictor(module.net)) <= 1
    batch = next(iter(task.train))  # type: ignore[arg-type]
    expected = nn.functional.cross_entropy(module.net(batch[0]), batch[1])
    assert task.compute_loss(module.net(batch[0]), batch).item() == pytest.approx(expected.item())  # type: ignore[union-attr]


def test_loaders_may_be_given_and_metrics_be_functions() -> None:
    train, val = DataLoader(pictures(16, 0), batch_size=8), DataLoader(pictures(16, 1), batch_size=8)
    module = Part()
    task = ts.Task.from_lightning(module, train=train, val=val, metric="accuracy", model="net")
    assert task.train is train
    assert 0 <= task.evaluate(predictor(module.net)) <= 100
    assert task.as_metric().unit == "%"
    own = ts.Task.from_lightning(module, train=train, val=val, metric=lambda predict, batches: 1.0, model="net")
    assert own.evaluate(predictor(module.net)) == 1.0


class Changed(Part):
    """A training_step of another kind; `loss` is what it does."""

    def __init__(self, loss: Callable[[Any, Tensor, Tensor], Any]) -> None:
        super().__init__()
        vars(self)["own"] = loss

    def training_step(self, batch: Any) -> Any:  # type: ignore[override]
        return self.own(self, *batch)


def entropy(logits: Tensor, y: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits, y)


CHANGES: dict[str, tuple[Callable[[Any, Tensor, Tensor], Any], str]] = {
    "augments": (lambda m, x, y: entropy(m.net(x + torch.randn_like(x)), y), "other inputs.*augment.*loss="),
    "calls twice": (lambda m, x, y: entropy(m.net(x) + m.net(-x), y), "2 times.*loss="),
    "never calls": (lambda m, x, y: entropy(m.net[0](x).mean((2, 3)), y), "never calls.*'net'"),
    "penalty": (lambda m, x, y: entropy(m.net(x), y) + m.net[0].weight.norm(), "weights of the model.*loss="),
    "no loss": (lambda m, x, y: (m.net(x), None)[1], "return a loss.*None"),
    "no gradient": (lambda m, x, y: entropy(m.net(x).detach(), y), "depends on the model's outputs.*loss="),
    "optimizers": (lambda m, x, y: (m.net(x), m.optimizers())[1], "training_step cannot be used; give loss="),
    "raises": (lambda m, x, y: entropy(m.net(x), y, 3), "training_step cannot be used.*TypeError"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_training_step_that_cannot_be_used_says_why(name: str) -> None:
    own, message = CHANGES[name]
    with pytest.raises(TaskError, match=message):
        ts.Task.from_lightning(Changed(own), Data(), metric="val_acc", model="net")
    task = ts.Task.from_lightning(
        Changed(own),
        Data(),
        metric="accuracy",
        model="net",
        inputs=lambda batch: (batch[0],),
        loss=lambda outputs, batch: entropy(outputs, batch[1]),
    )
    batch = next(iter(task.train))  # type: ignore[arg-type]
    assert task.compute_loss(task.forward(net(), batch), batch) is not None


class Manual(Part):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


class Moving(Data):
    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch


class Several(Data):
    def val_dataloader(self) -> Any:
        return [super().val_dataloader()] * 2


class Empty(pl.LightningModule):
    def training_step(self, batch: Any) -> Any:
        return None


def cases() -> Iterator[tuple[str, Callable[[], Any], str]]:
    make = ts.Task.from_lightning
    yield "no module", lambda: make(nn.Linear(2, 2), Data(), metric="val_acc"), "module.*LightningModule.*Linear"
    yield "no data", lambda: make(Part(), 3, metric="val_acc", model="net"), "data must be.*LightningDataModule.*3"
    yield "no part", lambda: make(Part(), Data(), metric="val_acc", model="body"), "'body'.*parts: net, accuracy"
    yield "the module", lambda: make(Part(), Data(), metric="val_acc"), "never calls the module itself.*model='net'"
    yield "manual", lambda: make(Manual(), Data(), metric="val_acc", model="net"), "optimizes by itself.*loss="
    yield "moving", lambda: make(Part(), Moving(), metric="val_acc", model="net"), "on_after_batch_transfer.*train="
    yield "several", lambda: make(Part(), Several(), metric="val_acc", model="net"), "2 loaders; give val="
    yield "no val", lambda: make(Part(), metric="val_acc", model="net", train=[1]), "val is None; give"
    yield (
        "higher",
        lambda: make(Part(), Data(), metric="accuracy", model="net", higher_is_better=True),
        "higher_is_better=True goes with",
    )


@pytest.mark.parametrize(("about", "make", "message"), [*cases()], ids=[about for about, _, _ in cases()])
def test_wrong_arguments_are_named(about: str, make: Callable[[], Any], message: str) -> None:
    with pytest.raises(TaskError, match=message):
        make()


def test_a_metric_that_is_not_logged_is_named_with_those_that_are() -> None:
    task = ts.Task.from_lightning(Whole(), Data(), metric="val_f1")
    with pytest.raises(TaskError, match="'val_f1'.*val_acc, val_loss"):
        task.evaluate(predictor(Whole()))
