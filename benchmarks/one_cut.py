"""One run of the comparison of criteria: cut the demo's baseline, finetune it, measure it before and after."""

from __future__ import annotations

import hashlib
import inspect
import time
import warnings
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

import torchslim as ts
from benchmarks.rows import Row, load, version
from examples.fashion_mnist import resnet, task
from examples.fashion_mnist.data import Batches
from torchslim.artifact.model_size import macs, parameters
from torchslim.core.batches import predictor
from torchslim.core.metrics import default_loss
from torchslim.core.task import Task
from torchslim.training.batch_norm import recalibrate_batch_norm

INPUTS = (torch.zeros(1, 1, 28, 28),)
ROUND_TO = 8
SAMPLES, BATCH = 512, 128  # of calibration, for both sides
STEPS = 400  # of the peer: what its reproduction of its paper takes
MEASURED = ("val", "test", "loss")

DEFAULTS: dict[str, Any] = {
    name: each.default for name, each in inspect.signature(ts.prune.channels).parameters.items()
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """How channels or blocks are ranked; only ours of channels have a normalization and a reduction."""

    side: Literal["ours", "peer", "blocks"] = "ours"
    criterion: str = DEFAULTS["criterion"]
    normalization: str = DEFAULTS["normalization"]
    reduction: str = DEFAULTS["reduction"]
    reconstruct: bool = False  # whether the remaining weights are solved for on the calibration


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A way, how much goes, and the seed of the calibration's draw, of random scores and of the finetuning's order."""

    way: Way
    sparsity: float
    seed: int
    epochs: int

    @property
    def key(self) -> Row:
        """What tells its row from others."""
        return {**asdict(self.way), "sparsity": self.sparsity, "seed": self.seed, "epochs": self.epochs}


def measure(run: Run, rows: Path) -> Row:
    """The run's row, on one thread; a cut that was finetuned with this seed before is not finetuned again."""
    torch.set_num_threads(1)
    row = run.key | {"version": version(run.way.side), "reason": ""}
    try:
        return row | _measured(run, rows)
    except Exception as error:  # noqa: BLE001 - whatever a criterion may raise is its row
        return row | {"reason": f"{type(error).__name__}: {error}"}


def unpruned() -> Row:
    """The row of the baseline."""
    torch.set_num_threads(1)
    model, data = resnet(), task()
    accuracy = {split: data.evaluate(predictor(model), split) for split in ("val", "test")}
    return {"side": "unpruned", "macs": macs(model, INPUTS).total, "parameters": parameters(model), **accuracy}


def _measured(run: Run, rows: Path) -> Row:
    model, data = resnet(), seeded_task(run.seed)
    assert data.calibration is not None
    batches = list(data.calibration)
    before, started = macs(model, INPUTS).total, time.monotonic()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        cut = {"ours": ours, "peer": peer, "blocks": blocks}[run.way.side](model, run, batches)
    row: Row = {
        "macs": macs(cut, INPUTS).total,
        "parameters": parameters(cut),
        "widths": [layer.out_channels for layer in cut.modules() if isinstance(layer, nn.Conv2d)],
        "cut_seconds": time.monotonic() - started,
        "warnings": [str(each.message) for each in caught if issubclass(each.category, UserWarning)],
        "val_cut": data.evaluate(predictor(cut), "val"),
    }
    row["macs_left"] = row["macs"] / before
    recalibrate_batch_norm(cut, data.forward, batches)
    row |= {"val_recalibrated": data.evaluate(predictor(cut), "val"), "digest": digest(cut)}
    same = ("digest", "seed", "epochs")
    for known in load(rows):
        if all(known.get(name) == (row | run.key)[name] for name in same) and not known["reason"]:
            return row | {name: known[name] for name in MEASURED} | {"finetuned": False}
    ctx = ts.Context(task=data, teacher=cut, example_inputs=INPUTS, seed=run.seed)
    training = ts.Finetune(epochs=run.epochs, optimizer="sgd", lr=0.01, weight_decay=5e-4, keep="last")
    report = training.fit(cut, ctx)
    row |= {split: data.evaluate(predictor(cut), split) for split in ("val", "test")}
    return row | {"loss": report.history[-1]["loss_label"], "finetuned": True}


def seeded_task(seed: int) -> Task:
    """The demo's task, with a calibration of its own for each seed, from train and without augmentation."""
    data = task(BATCH)
    assert isinstance(data.train, Batches)
    order = torch.randperm(len(data.train.labels), generator=torch.Generator().manual_seed(seed))[:SAMPLES]
    return replace(data, calibration=Batches((data.train.images[order], data.train.labels[order]), BATCH))


def digest(model: nn.Module) -> str:
    """Of all that a finetuning starts from."""
    found = hashlib.sha256()
    for name, value in model.state_dict().items():
        found.update(f"{name} {tuple(value.shape)}".encode() + value.contiguous().numpy().tobytes())
    return found.hexdigest()[:16]


def ours(model: nn.Module, run: Run, batches: list[tuple[Tensor, Tensor]]) -> nn.Module:
    """One cut to the target."""
    options: Any = {"normalization": run.way.normalization, "reduction": run.way.reduction}
    return ts.prune.channels(
        model, INPUTS, run.sparsity, of="macs", criterion=run.way.criterion, round_to=ROUND_TO, batches=batches,
        seed=run.seed, reconstruct=run.way.reconstruct, **options,
    )  # fmt: skip


def blocks(model: nn.Module, run: Run, batches: list[tuple[Tensor, Tensor]]) -> nn.Module:
    """Whole blocks up to the target, or all that can go, and channels for the rest."""
    plan = ts.prune.inspect(model, INPUTS)
    prunable = [block for block in plan.blocks if block.prunable]
    reachable = sum(block.macs for block in prunable) / plan.macs
    removed = min(run.sparsity, reachable - 1e-6)
    shorter = ts.prune.blocks(
        model, INPUTS, removed, of="macs", criterion=run.way.criterion, batches=batches, seed=run.seed
    )
    done = 1 - macs(shorter, INPUTS).total / plan.macs
    rest = 1 - (1 - run.sparsity) / (1 - done)
    return shorter if rest < 0.01 else ours(shorter, replace(run, way=Way(), sparsity=rest), batches)


def peer(model: nn.Module, run: Run, batches: list[tuple[Tensor, Tensor]]) -> nn.Module:
    """Small steps, ranked globally, until the target is reached, as in its reproduction of its paper's results.

    Its Taylor scores get gradients of the model as it is before each step; those of a model that has not changed since
    the last step are what they were.

    Source: https://github.com/VainF/Torch-Pruning, reproduce/main.py (progressive pruning) and README (Taylor).
    """
    import torch_pruning as tp  # type: ignore[import-untyped]

    importances = {"l2": tp.importance.GroupMagnitudeImportance, "taylor": tp.importance.GroupTaylorImportance}
    pruner = tp.pruner.BasePruner(
        model, INPUTS[0], importance=importances[run.way.criterion](), global_pruning=True, pruning_ratio=1.0,
        iterative_steps=STEPS, round_to=ROUND_TO, ignored_layers=[model.head], in_channel_groups={},
        out_channel_groups={}, num_heads={},
    )  # fmt: skip
    before = macs(model, INPUTS).total
    now, last = before, 0
    while now > (1 - run.sparsity) * before and pruner.current_step < pruner.iterative_steps:
        if run.way.criterion == "taylor" and now != last:
            model.zero_grad()
            for images, labels in batches:
                default_loss(model(images), labels).backward()
        pruner.step()
        last, now = now, macs(model, INPUTS).total
    model.zero_grad()
    return model
