"""A folder of narrowed programs that another machine times: what `Prune(latency_table=...)` is measured with there."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from torchslim.artifact.storage import bench_script
from torchslim.core.batches import take_first
from torchslim.core.files import clean_temporaries, remove, sha256, write_bytes, write_json
from torchslim.core.folder_lock import LOCK, holding
from torchslim.core.isolation import copy_model, preserved_globals
from torchslim.core.step import Event, Inputs, Step, Target, log_progress, step_name
from torchslim.core.task import Task
from torchslim.errors import RecipeError
from torchslim.pipeline.target_bench import Bench
from torchslim.pipeline.work_folder import own
from torchslim.prune import Prune
from torchslim.prune.channel_step import PruneChannels
from torchslim.prune.latency.table import FORMAT, programs, variants
from torchslim.runtimes import Deployed, find_runtime
from torchslim.runtimes.base import as_array
from torchslim.runtimes.kernel_listing import UNWANTED

PACK = "pack.json"
PACK_FORMAT = "torchslim-latency-pack"


def pack(
    model: nn.Module,
    task: Task,
    steps: Sequence[Step],
    folder: str | Path,
    *,
    target: Target | None = None,
    example_inputs: Inputs | None = None,
    dynamic_shapes: Any = "batch",
    progress: Callable[[Event], None] = log_progress,
) -> Path:
    """Write all programs that a table of latencies needs, with the script that times them.

    The folder goes to the machine that the model will run on; `python bench.py` there needs numpy and the runtime
    alone, and writes `latency.json`, which `Prune(of="latency", latency_table=...)` takes.

    Args:
        model: what the recipe starts from.
        task: gives the example inputs, and calibrates where the recipe ends with integers.
        steps: of the recipe: the first that prunes to a latency is meant.
        folder: empty, or one that was packed before.
        target: the runtime, and its threads on the other machine.
        example_inputs: what is timed; by default the inputs of the first validation batch.
        dynamic_shapes: as for `ts.compress`.
        progress: called as programs are written.

    Raises:
        RecipeError: no step prunes to a latency, an earlier one changes the model's shape, the runtime has no file, or
            the folder holds something else.
    """
    folder, target = Path(folder), target or Target()
    pruning = _step(steps)
    if find_runtime(target.runtime).suffix is None:
        raise RecipeError(
            f"runtime {target.runtime!r} has no file that another machine could time; name another runtime"
        )
    own(folder, RecipeError, "latency pack", (folder / PACK).is_file)
    with holding(folder / LOCK), preserved_globals(0):
        clean_temporaries(folder)
        remove(folder / PACK)  # until the folder is whole again
        copied, _ = copy_model(model)
        inputs: Any = task.inputs(take_first(task.val, "val")) if example_inputs is None else example_inputs
        bench = Bench(example_inputs=inputs, target=target, task=task, steps=steps, dynamic_shapes=dynamic_shapes)
        plan = pruning.options.plan(copied, inputs, task.examples)
        selection, rows = programs(plan, pruning.amount)
        wanted = variants(plan, selection, rows)
        whole = bench.deploy(bench.ended(plan.model))
        suffix = whole.suffixes[0]
        whole.save(folder / f"whole{suffix}")
        written = []
        for done, variant in enumerate(wanted, 1):
            made = variant.make()
            if made is not None:  # else that width is left out, as it is where it is measured here
                bench.deploy(bench.ended(made)).save(folder / f"{variant.name}{suffix}")
                written.append({"row": variant.row.key, "width": variant.width, "file": f"{variant.name}{suffix}"})
            progress(Event(step="latency", phase="pack", current=done, total=len(wanted)))
        names = _write_script(folder, whole, [f"whole{suffix}", *(str(row["file"]) for row in written)])
        spec = {"sizes": whole.spec.sizes, "dtypes": whole.spec.dtypes, "batch_axis": whole.spec.batch_axis}
        about = {
            "format": PACK_FORMAT,
            "gives": FORMAT,
            "about": bench.about(plan.model),
            "whole": f"whole{suffix}",
            "programs": written,
            "spec": spec,
            "disabled_optimizers": UNWANTED,
            "files": {name: sha256(folder / name) for name in names},
        }
        write_json(folder / PACK, about)  # last: a folder that has it is whole
    return folder


def _write_script(folder: Path, whole: Deployed, programs: Sequence[str]) -> list[str]:
    """Write what times the programs: the inputs and bench.py. Returns the names of all files that it reads."""
    suffix = whole.suffixes[0]
    buffer = io.BytesIO()
    arrays: dict[str, Any] = {f"in{index:03d}": as_array(leaf) for index, leaf in enumerate(whole.example)}
    np.savez(buffer, **arrays)
    write_bytes(folder / "example.npz", buffer.getvalue())
    exported = [(folder / name).read_bytes() for name in programs] if suffix == ".pt2" else []
    write_bytes(folder / "bench.py", bench_script(exported))
    return ["example.npz", *(name.removesuffix(suffix) + ending for name in programs for ending in whole.suffixes)]


def _step(steps: Sequence[Step]) -> PruneChannels:
    for number, step in enumerate(steps, 1):
        if isinstance(step, Prune) and step.of == "latency":
            return step.channels()
        if getattr(step, "student", None) is not None or (isinstance(step, Prune) and step.pattern == "channel"):
            raise RecipeError(
                f"step {number} ({step_name(step)!r}) changes the model's shape before one prunes to a latency: what "
                "that will receive is not known yet; put it first"
            )
    raise RecipeError("no step of the recipe prunes to a latency: give one pattern = 'channel' and of = 'latency'")
