"""`torchslim.search`: checks a search, rehearses it, and starts its worker."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from torchslim._version import __version__
from torchslim.analysis.result import Sensitivity
from torchslim.artifact.remote import TimingWorker
from torchslim.core import distributed
from torchslim.core.arguments import checks_arguments
from torchslim.core.batches import take_first
from torchslim.core.files import digest
from torchslim.core.fingerprint import fingerprint
from torchslim.core.isolation import warn
from torchslim.core.layer_patterns import as_list
from torchslim.core.parts import select_parts
from torchslim.core.step import Event, Inputs, ignore_progress, log_progress
from torchslim.core.task import Task
from torchslim.core.usable import usable
from torchslim.errors import PruneError, RecipeError
from torchslim.pipeline.runner import rehearse_steps
from torchslim.training.calibration import part_examples, spanning_examples
from torchslim.tuning.result import SearchResult
from torchslim.tuning.sampling import Sampler
from torchslim.tuning.search_folder import check_space, claim_folder, make_ledgers, mark_folder
from torchslim.tuning.space import Space, make_space
from torchslim.tuning.storage import open_storage
from torchslim.tuning.trial import Lab
from torchslim.tuning.worker import Worker, run_options


@checks_arguments(RecipeError, earlier=("recipe", "model", "task"))
def search(
    model: nn.Module,
    task: Task,
    recipe: Mapping[str, Any] | Space,
    *,
    workdir: str | Path,
    teacher: nn.Module | None = None,
    storage: str | Path | None = None,
    study: str | None = None,
    sampler: Sampler = "gp",
    example_inputs: Inputs | None = None,
    dynamic_shapes: Any = "auto",
    part: str | Sequence[str] | None = None,
    beat: float = 5.0,
    rehearse: bool = True,
    worker: TimingWorker | None = None,
    progress: Callable[[Event], None] = log_progress,
) -> SearchResult:
    """Find the best recipes under a budget: a Pareto front of artifacts, each with its recipe.

    Each trial first runs without training and on a part of the data. Trials that violate a bound which training cannot
    change, or that others beat in everything, stop there. The others are trained in part. The best are then trained in
    full, deployed and measured. Steps that candidates share run once.

    An interrupted search resumes when it is called with the same folder. Any number of processes can share the storage
    and work on one search.

    Args:
        model, task: as for `compress`.
        recipe: the parsed TOML, with `{"search": [...]}` in place of each value that varies, and a "budget" table.
        teacher, example_inputs, dynamic_shapes, part: as for `compress`.
        workdir: folder of the search; the front's artifacts are in `front/`.
        storage: what workers share: an Optuna URL, or a file; by default one in `workdir`.
        study: its name in the storage; by default the folder's name.
        sampler: "gp" (Gaussian processes) needs few trials; "tpe" (densities) suits many trials or objectives, and
            replaces "gp" there; "random" does not learn.
        beat: seconds between signs of life of a worker.
        rehearse: begin with all steps of one recipe at least effort, as for `compress`; trials are not rehearsed.
        worker: a machine that times programs, as for `compress`; not with method "solve", whose tables need profiles.
        progress: called with an `Event` at every phase.

    Raises:
        RecipeError: a range or the budget is invalid, or the folder or study belongs to another search.
        StorageError: the storage cannot be reached.
    """
    model = usable(model)
    teacher = None if teacher is None else usable(teacher, what="the teacher")
    space = recipe if isinstance(recipe, Space) else make_space(recipe)
    check_space(space)
    distributed.connect()
    first_batch = take_first(task.val, "val")
    part = space.document.get("part", part)
    if worker is not None and space.budget.method == "solve":
        raise RecipeError("method = 'solve' profiles programs on this machine; leave it out, or leave worker out")
    if worker is not None and part is not None:
        raise RecipeError("a worker times whole models, as the code around parts stays here; leave part or worker out")
    key = _key(space, model, teacher, first_batch, part, worker)
    inputs: Any = task.inputs(first_batch) if example_inputs is None else example_inputs
    dynamic_shapes = space.document.get("dynamic_shapes", dynamic_shapes)
    folder = Path(workdir)
    paths = select_parts(model, part)
    parts = {} if part is None else part_examples(model, task, paths, space.document.get("seed", 0))
    lab = _make_lab(space, folder, model, task, teacher, inputs, dynamic_shapes, progress)
    spanned = dynamic_shapes == "auto" and example_inputs is None  # as in `run_steps`, which trains the finalists
    lab = replace(lab, parts=parts, worker=worker, examples=spanning_examples(task, lab.seed) if spanned else ())
    name = study or folder.resolve().name
    _mark(folder)
    opened = open_storage(storage or folder / "study.journal") if distributed.is_first() else None
    if space.budget.method == "solve":
        from torchslim.tuning.shared_tables import SharedTables  # slow to import: it loads the quantizer
        from torchslim.tuning.solve_worker import begun_solving

        shared = None if opened is None else SharedTables(opened, name, key, beat)
        solving = begun_solving(space, lab, shared)
        space = solving.space
    ledgers = None if opened is None else make_ledgers(space, name, key, opened, sampler, beat)
    if distributed.is_first():
        claim_folder(folder, key, space)
    distributed.wait()
    if rehearse and space.document.get("rehearse", True):
        _rehearse(space, lab)
    if space.budget.method == "solve":
        return solving.worker(lab, folder, ledgers, key).run()
    return Worker(space, lab, folder, ledgers).run()


def _mark(folder: Path) -> None:
    """Mark the folder as one of a search in the first process, before anything is written to it."""
    if distributed.is_first():
        mark_folder(folder)
    distributed.wait()


def _rehearse(space: Space, lab: Lab) -> None:
    """Rehearse a recipe that skips no step, once in a folder."""
    try:
        recipe = space.recipe(space.whole(0.5))
    except RecipeError:  # the middles of the ranges do not fit together
        recipe = space.recipe(space.first)
    try:
        rehearse_steps(lab.model, lab.task, recipe.steps, run_options(recipe, lab), lab.folder.parent)
    except PruneError as error:  # of this amount; others may be possible, and the trials find out
        warn(str(error))


def _key(
    space: Space,
    model: nn.Module,
    teacher: nn.Module | None,
    first_batch: Any,
    part: str | Sequence[str] | None,
    worker: TimingWorker | None,
) -> str:
    """Digest of everything that trials depend on: workers with equal keys share a study."""
    sensitivity = space.document.get("sensitivity")
    return digest(
        space.key,
        __version__,
        fingerprint(model.state_dict()),
        fingerprint(first_batch),
        "" if teacher is None else fingerprint(teacher.state_dict()),
        *([Sensitivity.load(sensitivity).priors()] if sensitivity else []),
        *([] if part is None else [as_list(part)]),
        *([] if worker is None else [worker.machine()]),
    )


def _make_lab(
    space: Space,
    folder: Path,
    model: nn.Module,
    task: Task,
    teacher: nn.Module | None,
    inputs: Inputs,
    dynamic_shapes: Any,
    progress: Callable[[Event], None],
) -> Lab:
    return Lab(
        model=model,
        task=task,
        teacher=teacher,
        budget=space.budget,
        folder=folder / "cache",
        example_inputs=inputs,
        seed=space.document.get("seed", 0),
        dynamic_shapes=dynamic_shapes,
        short=space.budget.short,
        progress=progress if distributed.is_first() else ignore_progress,
    )
