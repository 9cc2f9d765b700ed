"""What is gained by several processes on this machine: python -m benchmarks.spread [fsdp | workers]

fsdp: two processes train a transformer with AdamW for a few steps, on the CPU with gloo. Printed are the bytes that
each holds between two steps, the most that it holds of weights during one, its memory at the peak, and the time of a
step, against a copy of the model in each. Times are of this backend: they say nothing about GPUs.

workers: one and two workers of one search, each a process with one thread, try the same number of recipes. Printed are
the trials an hour, from the start of the first trial to the end of the last, and the processor time, which other
programs on the machine change less.
"""

from __future__ import annotations

import json
import os
import resource
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp
from torch import Tensor, nn

import torchslim as ts
from torchslim.core import distributed
from torchslim.training.loop import Hook, LabelLoss, Loop
from torchslim.tuning.storage import open_storage

MAPPED = "MALLOC_MMAP_THRESHOLD_"
WIDTH, DEPTH, CLASSES, STEPS = 512, 12, 10, 8


class Transformer(nn.Module):
    """Blocks in a list, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(WIDTH, 8, 4 * WIDTH, dropout=0.0, batch_first=True) for _ in range(DEPTH)
        )
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


class Watch(Hook):
    """What this process holds, and how long its steps take."""

    def on_start(self, loop: Loop) -> None:
        """Look on as each block computes."""
        self.ends: list[float] = []
        self.inside = 0
        own = [parameter for parameter in loop.model.parameters() if distributed.is_spread(parameter)]
        model: Any = loop.model

        def look(*_: Any) -> None:
            gathered = [parameter for parameter in model.parameters() if not distributed.is_spread(parameter)]
            self.inside = max(self.inside, held(own) + held(gathered))

        for block in model.blocks:
            block.register_forward_pre_hook(look)

    def on_step(self, loop: Loop) -> None:
        """Look on between two steps."""
        self.ends.append(time.perf_counter())
        self.peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        weights = list(loop.model.parameters())
        remembered = [value for values in loop.optimizer.state.values() for value in values.values()]
        self.between = held([*weights, *(weight.grad for weight in weights), *remembered])


def held(tensors: Iterable[Any]) -> int:
    """Bytes of these in this process."""
    return sum(each.numel() * each.element_size() for each in map(distributed.local, tensors) if each is not None)


def measure(rank: int, port: int, strategy: str, folder: str) -> None:
    """One of two processes."""
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "spread",
    }  # fmt: skip
    torch.set_num_threads(1)
    distributed.connect()
    torch.manual_seed(0)
    x, y = torch.randn(4, 8, WIDTH), torch.arange(4) % CLASSES
    task = ts.Task(train=[(x, y)] * 2 * STEPS, val=[(x, y)], metric="accuracy")
    model, watch = Transformer(), Watch()
    engine = ts.Engine(accelerator="cpu", strategy=strategy)
    started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    ts.fit(model, task.train or (), LabelLoss(task), epochs=1, hooks=[watch], engine=engine)
    steps = [after - before for before, after in pairwise(watch.ends)]
    found = {"between": watch.between, "inside": watch.inside, "peak": watch.peak - started,
             "step": statistics.median(steps), "weights": held(model.parameters())}  # fmt: skip
    (Path(folder) / f"{rank}.json").write_text(json.dumps(found))
    distributed.wait()
    torch.distributed.destroy_process_group()


TRIALS = 12
RECIPE = f"""
model = "benchmarks.spread:network"
task = "benchmarks.spread:images"
threads = 1
rehearse = false
[[step]]
do = "prune"
pattern = "channel"
sparsity = {{ search = [0.2, 0.6] }}
[[step]]
do = "distill"
epochs = 8
lr = {{ search = [1e-3, 1e-2], log = true }}
[budget]
metric_drop = 50.0
minimize = ["metric_drop", "macs"]
trials = {TRIALS}
finalists = 1
"""


def network() -> nn.Module:
    """Four convolutions and a head."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for inner, outer in pairwise((1, 32, 32, 32, 32)):
        layers += [nn.Conv2d(inner, outer, 3, padding=1, bias=False), nn.BatchNorm2d(outer), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, CLASSES))


def images() -> ts.Task:
    """Noise whose level tells the class."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(CLASSES, (768,), generator=generator)
    pixels = torch.randn(768, 1, 16, 16, generator=generator) + labels.view(-1, 1, 1, 1)
    batches = list(zip(pixels.split(64), labels.split(64), strict=True))
    return ts.Task(train=batches[:8], val=batches[8:], metric="accuracy")


def searched(workers: int) -> tuple[float, float]:
    """Trials an hour and processor seconds a trial of some workers of one search, which share a folder."""
    import optuna

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "recipe.toml").write_text(RECIPE)
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(folder / "cache")}
        command = [
            sys.executable,
            "-m",
            "torchslim",
            "search",
            str(folder / "recipe.toml"),
            "--out",
            str(folder / "out"),
        ]
        silent = subprocess.DEVNULL
        before = processor_seconds()
        started = [subprocess.Popen(command, env=environment, stdout=silent, stderr=silent) for _ in range(workers)]
        codes = [each.wait() for each in started]
        if any(codes):
            raise SystemExit("a worker failed")
        study = optuna.load_study(study_name="out", storage=open_storage(folder / "out" / "study.journal"))
        done = [trial for trial in study.trials if "result" in trial.user_attrs]
        assert len(done) == TRIALS
        assert len({trial.user_attrs["worker"]["pid"] for trial in done}) == workers
        span = max(trial.datetime_complete for trial in done) - min(trial.datetime_start for trial in done)
    return TRIALS * 3600 / span.total_seconds(), (processor_seconds() - before) / TRIALS


def processor_seconds() -> float:
    """Processor time of all processes that this one has started and waited for."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def compare_workers(rounds: int = 3) -> None:
    """One and two workers in turn: medians, and the least and the most."""
    rows: dict[int, list[tuple[float, float]]] = {1: [], 2: []}
    for _ in range(rounds):
        for workers, figures in rows.items():
            figures.append(searched(workers))
    print(f"{rounds} searches of {TRIALS} trials each; load of the machine at the end: {os.getloadavg()[0]:.1f}")
    print("| workers | trials an hour | processor seconds a trial, with the start and the full training |")
    print("| ---: | ---: | ---: |")
    for workers, figures in rows.items():
        cells = [
            f"{statistics.median(column):.{digits}f} ({min(column):.{digits}f} to {max(column):.{digits}f})"
            for column, digits in zip(zip(*figures, strict=True), (0, 1), strict=True)
        ]
        print(f"| {workers} | {' | '.join(cells)} |")


def compare_strategies() -> None:
    """Both ways, the second process's figures, with and without an allocator that gives memory back at once."""
    rows: dict[str, dict[str, float]] = {"ddp": {}, "fsdp": {}}
    # glibc keeps freed blocks in its heap, so that the peak tells what it kept; mapped ones are gone, and cost time
    for strategy, mapped in product(rows, (True, False)):
        os.environ.pop(MAPPED, None)
        os.environ |= {MAPPED: "131072"} if mapped else {}
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = int(free.getsockname()[1])
        with tempfile.TemporaryDirectory() as folder:
            mp.spawn(measure, (port, strategy, folder), nprocs=2)
            found = json.loads((Path(folder) / "1.json").read_text())
            rows[strategy] |= {"mapped": found["peak"]} if mapped else found
    copied, spread = rows["ddp"], rows["fsdp"]
    print(f"weights of the model: {copied['weights'] / 1e6:.0f} MB")
    print("| in each of 2 processes | DDP | FSDP | ratio |\n| --- | ---: | ---: | ---: |")
    for name, key, scale, unit in (
        ("weights, gradients, optimizer state between two steps", "between", 1e6, "MB"),
        ("most weights at once in a forward pass", "inside", 1e6, "MB"),
        ("growth of the process's memory at its peak, freed blocks given back", "mapped", 1e6, "MB"),
        ("the same as glibc does by default, keeping them", "peak", 1e6, "MB"),
        ("median step, CPU with gloo", "step", 1e-3, "ms"),
    ):
        print(f"| {name} | {copied[key] / scale:.0f} {unit} | {spread[key] / scale:.0f} {unit} | "
              f"{spread[key] / copied[key]:.2f} |")  # fmt: skip


if __name__ == "__main__":
    parts = {"fsdp": compare_strategies, "workers": compare_workers}
    for part in sys.argv[1:] or parts:
        parts[part]()
