"""What each channel group and each layer costs when it alone is pruned or quantized: measured, kept, used as priors."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from torchslim._version import __version__
from torchslim.analysis.measures import MEASURES, Measure
from torchslim.analysis.result import KIND, Known, Point, Sensitivity, percent, point_of
from torchslim.core import distributed
from torchslim.core.arguments import checks_arguments
from torchslim.core.batches import take_first
from torchslim.core.files import digest, present
from torchslim.core.fingerprint import canonical, fingerprint
from torchslim.core.hardware import cache_folder, describe_machine, instruction_set
from torchslim.core.isolation import warn
from torchslim.core.layer_patterns import Patterns, check_patterns
from torchslim.core.seals import key_id, read_sealed, write_sealed
from torchslim.core.step import Event, Inputs, log_progress
from torchslim.core.task import Task
from torchslim.core.usable import usable
from torchslim.errors import SensitivityError, StorageError
from torchslim.prune.criteria.registry import Criterion, Scorer
from torchslim.quantize.schemes import find_scheme
from torchslim.runtimes import find_runtime

if TYPE_CHECKING:
    from torchslim.analysis.probe import Sensing


@checks_arguments(SensitivityError)
def sensitivity(
    model: nn.Module,
    task: Task,
    *,
    example_inputs: Inputs | None = None,
    ratios: Sequence[float] = (0.25, 0.5, 0.75),
    schemes: Sequence[str] = ("int8", "int4-weights"),
    measure: Measure = "sqnr",
    runtime: str = "onnxruntime",
    include: Patterns = None,
    exclude: Patterns = None,
    samples: int = 512,
    workdir: str | Path | None = None,
    criterion: str | Criterion | Scorer = "lamp",
    seed: int = 0,
    name: str = "",
    progress: Callable[[Event], None] = log_progress,
) -> Sensitivity:
    """What each channel group costs when it alone is pruned, and each layer when it alone is quantized.

    A group is physically cut, the rest of the model stays; batch norms are not recalibrated. A layer is rounded as the
    quantized model would round it: its weights, what it reads and, of convolutions, what they give. Every point costs
    at most one pass over the data, less what lies before the change. Points are kept on disk as they are measured.

    Args:
        model: a trained module; it is left as it was.
        task: calibration data for "sqnr" and "kl", val for "metric".
        example_inputs: by default the inputs of the first validation batch.
        ratios: of the channels of a group that are removed, each in (0, 1); none: no group is pruned.
        schemes: names of `SCHEMES`; none: no layer is quantized.
        measure: "sqnr" of all floating-point outputs, "kl" of the logits, or "metric".
        runtime: decides what of a layer is quantized, and how.
        include: patterns of layers; only they, and groups with a member among them, are looked at.
        exclude: patterns of layers that are left alone.
        samples: of calibration, where the task does not name calibration batches.
        workdir: where points are kept; by default the cache folder of this machine.
        criterion: which channels of a group go first.
        seed: of everything random.
        name: what the model is called; by default its class.
        progress: called with an `Event` at every phase.

    Raises:
        SensitivityError: arguments out of their range, or nothing that could be measured.
        TorchslimError: the task or the model cannot be used.
    """
    model = usable(model, SensitivityError)
    ratios, schemes = tuple(ratios), tuple(schemes)
    _check(ratios, schemes, measure, samples)
    find_runtime(runtime)
    check_patterns(model, include, exclude)
    from torchslim.analysis.probe import Sensing  # it loads what exports and quantizes

    with _steady(seed):
        inputs: Any = task.inputs(take_first(task.val, "val")) if example_inputs is None else example_inputs
        sensing = Sensing(
            model=model,
            task=task,
            example_inputs=inputs,
            measure=measure,
            runtime=runtime,
            include=include,
            exclude=exclude,
            samples=samples,
            criterion=criterion,
            seed=seed,
            progress=progress,
        )
        key = _key(sensing)
        folder = Path(workdir) if workdir else cache_folder() / KIND
        shelf = Shelf(folder / f"{key_id(key)[:16]}.points", key)
        points: list[Point] = []
        if ratios:
            points += shelf.points("channels", [percent(each) for each in ratios], sensing.channels)
        if schemes:
            points += shelf.points("layer", schemes, sensing.layers)
        shelf.head(sensing)
        if not any(point.value is not None for point in points):
            reasons = [*shelf.notes, *(point.refused for point in points)]
            raise SensitivityError(f"nothing could be measured: {'; '.join(dict.fromkeys(reasons)) or 'no layers'}")
    return Sensitivity(
        model=name or type(model).__name__,
        measure=measure,
        runtime=runtime,
        points=tuple(points),
        machines={"this": describe_machine()},
        notes=tuple(shelf.notes),
        **shelf.scale,
    )


def _check(ratios: Sequence[float], schemes: Sequence[str], measure: str, samples: int) -> None:
    """Raise for arguments out of their range."""
    if measure not in MEASURES:
        raise SensitivityError(f"measure must be one of {', '.join(map(repr, MEASURES))}, got {measure!r}")
    for ratio in ratios:
        if not 0 < ratio < 1:
            raise SensitivityError(f"a ratio is the fraction of a group's channels to remove, in (0, 1); got {ratio}")
    if not ratios and not schemes:
        raise SensitivityError("neither ratios nor schemes were given; there is nothing to measure")
    if samples < 1:
        raise SensitivityError(f"samples must be at least 1, got {samples}")
    for scheme in schemes:
        find_scheme(scheme)


def _key(sensing: Sensing) -> str:
    """Everything that points depend on, but the changes themselves."""
    chosen = (sensing.include, sensing.exclude, sensing.criterion)
    of_metric = sensing.measure == "metric"
    return digest(
        __version__,
        instruction_set(),
        type(sensing.model).__qualname__,
        fingerprint(sensing.model.state_dict()),
        fingerprint([sensing.batches, take_first(sensing.task.val, "val") if of_metric else None]),
        fingerprint(sensing.example_inputs),
        [sensing.measure, sensing.runtime, *map(canonical, chosen), sensing.seed],
        canonical(sensing.task.metric) if of_metric else None,
    )


class Shelf:
    """Points on disk, written as each is measured."""

    def __init__(self, path: Path, key: str) -> None:
        self.path, self.key = path, key
        self.parts: dict[str, dict[str, list[dict[str, Any]]]] = {}  # by kind, by change
        self.done: list[str] = []
        self.notes: list[str] = []
        self.scale: dict[str, Any] = {}  # unit, direction and reference of the measure
        if present(path):
            try:
                found = json.loads(read_sealed(path, key))
                self.parts, self.done = found["parts"], found["done"]
                self.notes, self.scale = found["notes"], found["scale"]
            except StorageError as error:
                if distributed.is_first():
                    warn(f"{error}; all points are measured again")

    def points(
        self, kind: str, changes: Sequence[str], measure: Callable[[list[str], Known], Iterator[Point]]
    ) -> list[Point]:
        """Points of some changes: those on disk, and what `measure` gives for the changes that are not complete."""
        part = self.parts.setdefault(kind, {})
        missing = [change for change in changes if f"{kind} {change}" not in self.done]
        if missing:
            known = {(row["name"], row["change"]): point_of(row) for each in missing for row in part.get(each, ())}
            for point in measure(missing, known):
                part.setdefault(point.change, []).append({**asdict(point), "groups": list(point.groups)})
                self._write()
            self.done += [f"{kind} {each}" for each in missing]
            self._write()
        found = [point_of(row) for change in changes for row in part.get(change, ())]
        names = {name: place for place, name in enumerate(dict.fromkeys(each.name for each in found))}
        return sorted(found, key=lambda each: names[each.name])

    def head(self, sensing: Sensing) -> None:
        """What the points have in common."""
        new = [note for note in sensing.notes if note not in self.notes]
        if new or not self.scale:
            gauge = sensing.gauge
            self.notes += new
            self.scale = {"unit": gauge.unit, "higher_is_better": gauge.higher_is_better, "reference": gauge.reference}
            self._write()

    def _write(self) -> None:
        if distributed.is_first():
            found = {name: getattr(self, name) for name in ("parts", "done", "notes", "scale")}
            write_sealed(self.path, json.dumps(found, allow_nan=False).encode(), self.key)


@contextmanager
def _steady(seed: int) -> Iterator[None]:
    """The random state is given back, and attention takes the way whose modules are all called."""
    from torchslim.core.isolation import preserved_globals, unfused_attention

    with preserved_globals(seed), unfused_attention():
        yield
