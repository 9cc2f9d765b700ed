"""Damage of pruning each channel group alone, and of quantizing each layer alone: measured, and kept on disk.

A group is removed physically, and batch norms are not recalibrated. A layer is rounded as the quantized model rounds
it: its weights, its inputs and, for convolutions, its outputs. A pass over the data starts at the changed layer.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
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
from torchslim.core.isolation import copy_model, warn
from torchslim.core.layer_patterns import Patterns, check_patterns
from torchslim.core.parts import WHOLE, under
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
    reconstruct: bool = False,
    seed: int = 0,
    name: str = "",
    progress: Callable[[Event], None] = log_progress,
    part: str | Sequence[str] | None = None,
) -> Sensitivity:
    """Measure the damage of pruning each channel group alone and of quantizing each layer alone, in one data pass each.

    Args:
        model: a trained module; it is never modified.
        task: "sqnr" and "kl" are measured on its calibration data, "metric" on val.
        example_inputs: by default the inputs of the first validation batch.
        ratios: fractions of a group's channels to remove, in (0, 1); batch norms are not recalibrated; empty: none.
        schemes: names of `SCHEMES` that round a layer's weights, inputs and, for convolutions, outputs; empty: none.
        measure: "sqnr" of all floating-point outputs, in dB; "kl" of the logits, in nats; or "metric".
        runtime: decides which tensors of a layer are quantized, and how.
        include, exclude: patterns of layers to measure, with the groups of these layers, and of layers to leave out.
        samples: number of calibration samples, unless the task names calibration batches.
        workdir: folder where points are kept once they are measured; default: the cache folder of this machine.
        criterion: ranks the channels of a group; those with the lowest scores are removed.
        reconstruct: solve for the weights that read a pruned group before the damage is measured, as `Prune` does with
            the same option.
        seed: of everything random.
        name: of the model in the result; default: its class.
        progress: called with an `Event` at every phase.
        part: names or globs of submodules, which alone are changed: "sqnr" is that of the part's own outputs on the
            calls that the whole model makes of it, "metric" that of the whole model.

    Raises:
        SensitivityError: an argument is out of range, or nothing could be measured.
        TorchslimError: the task or the model cannot be used.
    """
    # slow to import: they load the exporter and the quantizer
    from torchslim.analysis.part_sensing import part_sensings
    from torchslim.analysis.probe import Sensing

    model, ratios, schemes = usable(model, SensitivityError), tuple(ratios), tuple(schemes)
    _check(model, ratios, schemes, measure, runtime, include, exclude, samples)
    with _steady(seed):
        options: dict[str, Any] = {
            "measure": measure,
            "runtime": runtime,
            "include": include,
            "exclude": exclude,
            "samples": samples,
            "criterion": criterion,
            "reconstruct": reconstruct,
            "seed": seed,
            "progress": progress,
        }
        sensings: Mapping[str, Sensing]
        if part is None:
            inputs = task.inputs(take_first(task.val, "val")) if example_inputs is None else example_inputs
            sensings = {WHOLE: Sensing(model=model, task=task, example_inputs=inputs, **options)}
        else:
            sensings = part_sensings(copy_model(model)[0].eval(), task, part, **options)
        return _measure(sensings, ratios, schemes, workdir, name or type(model).__name__)


def _measure(
    sensings: Mapping[str, Sensing],
    ratios: Sequence[float],
    schemes: Sequence[str],
    workdir: str | Path | None,
    name: str,
) -> Sensitivity:
    """Measure the points that are not on disk; return the points of all parts, by their names in the whole model."""
    points: list[Point] = []
    notes: list[str] = []
    for path, sensing in sensings.items():
        key = _key(sensing)
        folder = Path(workdir) if workdir else cache_folder() / KIND
        shelf = Shelf(folder / f"{key_id(key)[:16]}.points", key)
        own: list[Point] = []
        if ratios:
            own += shelf.points("channels", [percent(ratio) for ratio in ratios], sensing.channels)
        if schemes:
            own += shelf.points("layer", schemes, sensing.layers)
        shelf.head(sensing)
        points += [
            replace(point, name=under(path, point.name), groups=tuple(under(path, group) for group in point.groups))
            for point in own
        ]
        notes += [f"{path}: {note}" if path else note for note in shelf.notes]
    if not any(point.value is not None for point in points):
        reasons = [*notes, *(point.refused for point in points)]
        raise SensitivityError(f"nothing could be measured: {'; '.join(dict.fromkeys(reasons)) or 'no layers'}")
    return Sensitivity(
        model=name,
        measure=sensing.measure,
        runtime=sensing.runtime,
        points=tuple(points),
        machines={"this": describe_machine()},
        notes=tuple(notes),
        **shelf.scale,
    )


def _check(
    model: nn.Module,
    ratios: Sequence[float],
    schemes: Sequence[str],
    measure: str,
    runtime: str,
    include: Patterns,
    exclude: Patterns,
    samples: int,
) -> None:
    """Raise for an argument that is out of its range or names nothing."""
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
    find_runtime(runtime)
    check_patterns(model, include, exclude)


def _key(sensing: Sensing) -> str:
    """Digest of everything that points depend on, except the changes themselves."""
    selection = (sensing.include, sensing.exclude, sensing.criterion)
    of_metric = sensing.measure == "metric"
    return digest(
        __version__,
        instruction_set(),
        type(sensing.model).__qualname__,
        fingerprint(sensing.model.state_dict()),
        fingerprint([sensing.batches, take_first(sensing.task.val, "val") if of_metric else None]),
        fingerprint(sensing.example_inputs),
        [sensing.measure, sensing.runtime, *map(canonical, selection), sensing.seed, sensing.reconstruct],
        canonical(sensing.task.metric) if of_metric else None,
        *sensing.more_of_key(),
    )


class Shelf:
    """Points on disk, written after every measurement.

    Args:
        path: file of the points.
        key: everything that the points depend on; a file with another key is an error, and is written anew.
    """

    def __init__(self, path: Path, key: str) -> None:
        self.path, self.key = path, key
        self.parts: dict[str, dict[str, list[dict[str, Any]]]] = {}  # rows of points, by kind and change
        self.done: list[str] = []  # "kind change" of all changes whose points are complete
        self.notes: list[str] = []
        self.scale: dict[str, Any] = {}  # unit, direction and reference of the measure
        if present(path):
            try:
                stored = json.loads(read_sealed(path, key))
                self.parts, self.done = stored["parts"], stored["done"]
                self.notes, self.scale = stored["notes"], stored["scale"]
            except StorageError as error:
                if distributed.is_first():
                    warn(f"{error}; all points are measured again")

    def points(
        self, kind: str, changes: Sequence[str], measure: Callable[[list[str], Known], Iterator[Point]]
    ) -> list[Point]:
        """Points of the changes, from disk or measured, by layer or group.

        Args:
            kind: "channels" or "layer".
            changes: as `Point.change` names them.
            measure: measures the points of changes that are not complete, except those that it is given.
        """
        part = self.parts.setdefault(kind, {})
        missing = [change for change in changes if f"{kind} {change}" not in self.done]
        if missing:
            known = {(row["name"], row["change"]): point_of(row) for change in missing for row in part.get(change, ())}
            for point in measure(missing, known):
                part.setdefault(point.change, []).append({**asdict(point), "groups": list(point.groups)})
                self._write()
            self.done += [f"{kind} {change}" for change in missing]
            self._write()
        points = [point_of(row) for change in changes for row in part.get(change, ())]
        places = {name: place for place, name in enumerate(dict.fromkeys(point.name for point in points))}
        return sorted(points, key=lambda point: places[point.name])

    def head(self, sensing: Sensing) -> None:
        """Store the notes and the scale that all points have in common."""
        new = [note for note in sensing.notes if note not in self.notes]
        if new or not self.scale:
            gauge = sensing.gauge
            self.notes += new
            self.scale = {"unit": gauge.unit, "higher_is_better": gauge.higher_is_better, "reference": gauge.reference}
            self._write()

    def _write(self) -> None:
        if distributed.is_first():
            content = {name: getattr(self, name) for name in ("parts", "done", "notes", "scale")}
            write_sealed(self.path, json.dumps(content, allow_nan=False).encode(), self.key)


@contextmanager
def _steady(seed: int) -> Iterator[None]:
    """Seed the block and restore the random state after it; attention calls its submodules, so that hooks see them."""
    from torchslim.core.isolation import preserved_globals, unfused_attention

    with preserved_globals(seed), unfused_attention():
        yield
