"""Distillation on two processes: the gradient is that of one process on the joined batch, and a recipe runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import torchslim as ts
from tests.support.distributed import torchslim_on_two, two_processes
from torchslim import distill
from torchslim.core import distributed
from torchslim.training.loaders import shared

PARTS: dict[str, dict[str, Any]] = {
    "kd": {"response": ts.KD()},
    "dist": {"response": ts.DIST(gather=True)},
    "hint": {"response": None, "feature": distill.Hint()},
    "attention": {"response": None, "feature": distill.AttentionTransfer()},
    "rkd": {"response": None, "relation": distill.RKD(gather=True)},
    "similarity_preserving": {"response": None, "relation": distill.SimilarityPreserving(gather=True)},
    "pkt": {"response": None, "relation": distill.PKT(gather=True)},
    "correlation_congruence": {"response": None, "relation": distill.CorrelationCongruence(gather=True)},
    "listwise_ranking": {"response": None, "relation": distill.ListwiseRanking(gather=True)},
}


def network(width: int) -> nn.Module:
    torch.manual_seed(width)
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1), nn.Tanh(), nn.Conv2d(width, width, 3, 2, 1), nn.Tanh(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 3),
    ).double()  # fmt: skip


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(8, 1, 6, 6, dtype=torch.float64, generator=generator), torch.arange(8) % 3


def gradients(name: str, mine: slice) -> dict[str, Tensor]:
    x, y = batch()
    student = network(3)
    task = ts.Task(val=[(x, y)], train=[(x, y)], metric="accuracy")
    ctx = ts.Context(task=task, teacher=network(5), example_inputs=(x,))
    torch.manual_seed(9)  # of the projections
    with ts.Distill(**PARTS[name]).lesson(student, ctx) as lesson:
        assert lesson.companion is not None
        lesson.companion.double()
        model: nn.Module = nn.parallel.DistributedDataParallel(student) if distributed.count() > 1 else student
        torch.stack(list(lesson.objective(model, (x[mine], y[mine])).values())).sum().backward()
        distributed.average_gradients(lesson.companion.parameters())
        trained = [*student.named_parameters(), *lesson.companion.named_parameters()]
    return {each: parameter.grad for each, parameter in trained if parameter.grad is not None}


def _worker(rank: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    found = {name: gradients(name, slice(rank * 4, rank * 4 + 4)) for name in PARTS}
    uneven = torch.arange(3.0 + rank).requires_grad_()
    joined = distributed.gathered(uneven)
    (joined * torch.arange(7)).sum().backward()
    if rank == 0:
        torch.save({**found, "joined": joined.detach(), "uneven": uneven.grad}, f"{folder}/found.pt")
    torch.distributed.barrier()  # the store is the first one's: it must not leave before the others
    torch.distributed.destroy_process_group()


@pytest.mark.distributed
def test_two_processes_have_the_gradient_of_one_on_the_joined_batch(tmp_path: Path) -> None:
    two_processes(_worker, str(tmp_path))
    found = torch.load(tmp_path / "found.pt", weights_only=True)
    assert found["joined"].tolist() == [0, 1, 2, 0, 1, 2, 3]
    assert found["uneven"].tolist() == [0, 2, 4]  # summed over both processes: each holds the whole loss
    for name in PARTS:
        one = gradients(name, slice(0, 8))
        assert found[name].keys() == one.keys()
        assert any(float(each.abs().max()) > 1e-8 for each in one.values())
        for parameter, expected in one.items():
            assert torch.allclose(found[name][parameter], expected, rtol=1e-6, atol=1e-9), (name, parameter)


def test_processes_take_turns_and_leave_out_what_is_too_little_for_all() -> None:
    class Fabric:
        world_size, global_rank = 2, 0

    assert list(shared(iter(range(5)), Fabric())) == [0, 2]
    Fabric.global_rank = 1
    assert list(shared(iter(range(5)), Fabric())) == [1, 3]


def model() -> nn.Module:
    return network(4).float()


def task() -> ts.Task:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 1, 6, 6, generator=generator)
    y = (x.mean((1, 2, 3)) > 0).long()
    train = DataLoader(TensorDataset(x, y), batch_size=8, shuffle=True)
    return ts.Task(train=train, val=[(x, y)], metric="accuracy")


RECIPE = """
model = "tests.distill.test_processes:model"
task = "tests.distill.test_processes:task"
runtime = "eager"

[[step]]
do = "distill"
epochs = 2
feature = [{ do = "hint" }]
relation = { do = "rkd", gather = true }
taps = { "0" = "0" }

[[step]]
do = "prune"
pattern = "channel"
sparsity = 0.5
of = "macs"
round_to = 1
min_channels = 1
criterion = "taylor"
schedule = "iterative"
rounds = 2
train = { do = "finetune", epochs = 1 }

[[step]]
do = "quantize"
mode = "qat"
train = { do = "distill", epochs = 2, feature = { do = "attention_transfer" }, teacher = "ema" }
"""


@pytest.mark.distributed
@pytest.mark.parametrize("killed", [False, True])
def test_a_recipe_runs_on_two_processes(tmp_path: Path, killed: bool) -> None:
    (tmp_path / "recipe.toml").write_text(RECIPE)
    command = ["run", str(tmp_path / "recipe.toml"), "--out", str(tmp_path / "out"), "--json"]

    def run() -> dict[str, Any]:
        found: dict[str, Any] = json.loads(torchslim_on_two(command, tmp_path))  # one process prints
        return found

    first = run()
    assert [row["name"] for row in first["rows"]] == ["baseline", "distill", "prune", "quantize", "artifact"]
    history = first["rows"][1]["history"]
    assert {"loss_response", "loss_hint", "loss_rkd", "loss_label"} <= history[0].keys()
    assert (tmp_path / "out" / "report.html").exists()
    if killed:  # the last step is gone: the run goes on from the one before, in both processes
        (tmp_path / "out" / "work" / "03-quantize" / "stage.json").unlink()
        again = run()
        assert again["rows"][1]["history"] == history
        assert again["rows"][3]["metric"] == first["rows"][3]["metric"]
        assert again["rows"][3]["history"] == first["rows"][3]["history"]
