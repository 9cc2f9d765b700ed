"""Write a folder of narrowed programs, which another machine times for `Prune(latency_table=...)`."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from torchslim.artifact.storage import bench_script
from torchslim.core.batches import take_first
from torchslim.core.files import clean_temporaries, remove, sha256, write_bytes, write_json
from torchslim.core.folder_lock import LOCK, holding
from torchslim.core.isolation import copy_model, preserved_globals
from torchslim.core.parts import select_parts
from torchslim.core.step import Event, Inputs, Step, Target, log_progress, step_name
from torchslim.core.task import Task
from torchslim.core.tensor_objects import by_structure
from torchslim.errors import RecipeError
from torchslim.pipeline.target_bench import Bench
from torchslim.pipeline.work_folder import own
from torchslim.prune import Prune
from torchslim.prune.channel_cut import parts_to_cut
from torchslim.prune.channel_step import PruneChannels
from torchslim.prune.latency.table import FORMAT, Variant, programs, variants
from torchslim.prune.masking.patterns import BLOCK, CHANNEL
from torchslim.runtimes import Deployed, find_runtime
from torchslim.runtimes.base import as_array
from torchslim.runtimes.kernel_listing import UNWANTED
from torchslim.training.calibration import part_examples

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
    dynamic_shapes: Any = "auto",
    progress: Callable[[Event], None] = log_progress,
    part: str | Sequence[str] | None = None,
) -> Path:
    """Write all programs of a latency table, and the script that times them; return the folder.

    Copy the folder to the machine that the model will run on, and run `python bench.py` there. It needs only numpy and
    the runtime, and writes `latency.json` for `Prune(of="latency", latency_table=...)`.

    Args:
        model: the model that the recipe starts from.
        task: source of the example inputs, and of calibration data where the recipe ends with integers.
        steps: steps of the recipe; the table is for the first that prunes to a latency.
        folder: an empty folder, or an earlier latency pack.
        target: the runtime, and its threads on the other machine.
        example_inputs: inputs of the timed calls; by default those of the first validation batch.
        dynamic_shapes: as for `ts.compress`.
        progress: called with an `Event` for every program.
        part: name of the submodule that the recipe compresses; its programs are timed alone.

    Raises:
        RecipeError: no step prunes to a latency, an earlier step changes the model's shape, the runtime saves no file,
            the folder holds something else, or there are several parts.
        SelectError: `part` names no submodule.
    """
    folder, target = Path(folder), target or Target()
    pruning = _step(steps)
    _check_runtime(target.runtime)
    own(folder, RecipeError, "latency pack", (folder / PACK).is_file)
    with holding(folder / LOCK), preserved_globals(0):
        clean_temporaries(folder)
        remove(folder / PACK)  # until the end: a folder with this file is complete
        copied, _ = copy_model(model)
        inputs: Any = task.inputs(take_first(task.val, "val")) if example_inputs is None else example_inputs
        bench = Bench(example_inputs=inputs, target=target, task=task, steps=steps, dynamic_shapes=dynamic_shapes)
        examples, options = task.examples, pruning.options
        if part is not None:
            path = _one_part(copied, part)
            calls = part_examples(copied, task, [path])
            bench = replace(bench, parts=calls).within(path)
            ((_, options),) = parts_to_cut(copied, options, [path])
            inputs, examples = calls[path][0], [group[0] for group in by_structure(calls[path])[1:]]
            copied = copied.get_submodule(path)
        plan = options.plan(copied, inputs, examples)
        narrowed = variants(plan, *programs(plan, pruning.amount))
        whole = bench.deploy_whole(bench.ended(plan.model))
        whole_name = f"whole{whole.suffixes[0]}"
        whole.save(folder / whole_name)
        rows = _write_programs(folder, bench, narrowed, progress)
        files = _write_script(folder, whole, [whole_name, *(row["file"] for row in rows)])
        content = {
            "format": PACK_FORMAT,
            "gives": FORMAT,
            "about": bench.about(plan.model),
            "whole": whole_name,
            "programs": rows,
            "spec": {"sizes": whole.spec.sizes, "dtypes": whole.spec.dtypes, "batch_axis": whole.spec.batch_axis},
            "disabled_optimizers": UNWANTED,
            "files": {name: sha256(folder / name) for name in files},
        }
        write_json(folder / PACK, content)
    return folder


def _one_part(model: nn.Module, part: str | Sequence[str]) -> str:
    """The path of the only part; raises RecipeError for several: a table of latencies is that of one program."""
    paths = select_parts(model, part)
    if len(paths) > 1:
        raise RecipeError(f"a latency pack is for one part, got {', '.join(map(repr, paths))}; name one of them")
    return paths[0]


def _check_runtime(name: str) -> None:
    """Raise RecipeError for a runtime that saves no file."""
    if find_runtime(name).suffix is None:
        raise RecipeError(f"runtime {name!r} has no file that another machine could time; name another runtime")


def _write_programs(
    folder: Path, bench: Bench, narrowed: Sequence[Variant], progress: Callable[[Event], None]
) -> list[dict[str, Any]]:
    """Write the narrowed programs, and return the row, width and file name of each."""
    rows = []
    for count, variant in enumerate(narrowed, 1):
        model = variant.make()
        if model is not None:  # widths that cannot be built are left out, as in a table that is measured here
            deployed = bench.deploy_whole(bench.ended(model))
            name = f"{variant.name}{deployed.suffixes[0]}"
            deployed.save(folder / name)
            rows.append({"row": variant.row.key, "width": variant.width, "file": name})
        progress(Event(step="latency", phase="pack", current=count, total=len(narrowed)))
    return rows


def _write_script(folder: Path, whole: Deployed, programs: Sequence[str]) -> list[str]:
    """Write bench.py and its inputs, and return the names of all files that it reads."""
    suffix = whole.suffixes[0]
    buffer = io.BytesIO()
    arrays: dict[str, Any] = {f"in{index:03d}": as_array(leaf) for index, leaf in enumerate(whole.example)}
    np.savez(buffer, **arrays)
    write_bytes(folder / "example.npz", buffer.getvalue())
    exported = [(folder / name).read_bytes() for name in programs] if suffix == ".pt2" else []
    write_bytes(folder / "bench.py", bench_script(exported))
    return ["example.npz", *(name.removesuffix(suffix) + ending for name in programs for ending in whole.suffixes)]


def _step(steps: Sequence[Step]) -> PruneChannels:
    """The first step that prunes to a latency; raises RecipeError without one, or if an earlier one changes shapes."""
    for number, step in enumerate(steps, 1):
        if isinstance(step, Prune) and step.of == "latency" and step.pattern == CHANNEL:
            return step.channels()
        if getattr(step, "student", None) is not None or (isinstance(step, Prune) and step.pattern in (CHANNEL, BLOCK)):
            raise RecipeError(
                f"step {number} ({step_name(step)!r}) changes the model's shape before one prunes to a latency: what "
                "that will receive is not known yet; put it first"
            )
    raise RecipeError("no step of the recipe prunes to a latency: give one pattern = 'channel' and of = 'latency'")
