"""Results of a sensitivity analysis: the measured points, by layer or channel group."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from torchslim._version import __version__
from torchslim.analysis.measures import MEASURES, Measure
from torchslim.core.files import write_json
from torchslim.errors import ArtifactError, SensitivityError
from torchslim.report.load import load_sensitivity

FORMAT = 1
KIND = "sensitivity"
Known = Mapping[tuple[str, str], "Point"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One change of a model and its measured effect.

    Attributes:
        name: of the channel group, such as "conv1.weight[0]", or of the layer.
        change: the removed share of channels, such as "25 %", or the scheme that the layer was quantized with.
        amount: fraction of the group's channels that was removed; None for a layer.
        value: of the measure; None if the changed model could not be built.
        refused: the reason why not; empty otherwise.
        groups: all channel groups that lost channels together.
    """

    name: str
    kind: Literal["channels", "layer"]
    change: str
    amount: float | None = None
    value: float | None = None
    refused: str = ""
    groups: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Sensitivity:
    """All points of a model; `print` shows them as a table.

    Attributes:
        model: name of the model.
        measure: a name of `MEASURES`, in `unit`.
        reference: the measure of the unchanged model; None if there is none.
        runtime: runtime whose profile the layers were quantized for.
        notes: parts of the model that could not be measured, with the reason.
    """

    model: str
    measure: Measure
    unit: str
    higher_is_better: bool
    reference: float | None
    runtime: str
    points: tuple[Point, ...]
    machines: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def damage(self, point: Point) -> float | None:
        """Damage of a change, 0 for none: noise over signal, nats, or the drop of the metric."""
        if point.value is None:
            return None
        if self.measure == "sqnr":
            return float(10 ** (-point.value / 10))
        lost = point.value - (self.reference or 0.0)
        return max(-lost if self.higher_is_better else lost, 0.0)

    def priors(self) -> dict[str, float]:
        """Relative damage by channel group and by layer, with mean 1 within each kind, for `Context.priors`.

        All ratios count alike, and all schemes count alike.
        """
        priors: dict[str, float] = {}
        for kind in ("channels", "layer"):
            shares: dict[str, list[float]] = {}
            for change in dict.fromkeys(point.change for point in self.points if point.kind == kind):
                damages: dict[str, list[float]] = {}
                for point in self.points:
                    if point.kind == kind and point.change == change and (damage := self.damage(point)) is not None:
                        for name in point.groups or (point.name,):
                            damages.setdefault(name, []).append(damage)
                means = {name: sum(values) / len(values) for name, values in damages.items()}
                mean = sum(means.values()) / max(len(means), 1)
                for name, value in means.items():
                    shares.setdefault(name, []).append(value / mean if mean else 1.0)
            rows = {name: sum(values) / len(values) for name, values in shares.items()}
            mean = sum(rows.values()) / max(len(rows), 1)
            priors |= {name: value / mean for name, value in rows.items()}
        return priors

    def most_sensitive(self, scheme: str) -> list[str]:
        """Layers sorted by the damage of a scheme, the worst first.

        Raises:
            SensitivityError: the scheme was not measured.
        """
        rows = [
            (point, self.damage(point)) for point in self.points if point.kind == "layer" and point.change == scheme
        ]
        if not rows:
            schemes = dict.fromkeys(point.change for point in self.points if point.kind == "layer")
            raise SensitivityError(f"scheme {scheme!r} was not measured; measured: {', '.join(schemes) or 'none'}")
        measured = [(point.name, damage) for point, damage in rows if damage is not None]
        return [name for name, _ in sorted(measured, key=lambda row: -row[1])]

    def to_dict(self) -> dict[str, Any]:
        """The result as plain lists, numbers and text."""
        points = [{**asdict(point), "groups": list(point.groups)} for point in self.points]
        head = {"format": FORMAT, "kind": KIND, "torchslim": __version__}
        own = {
            name: getattr(self, name)
            for name in ("model", "measure", "unit", "higher_is_better", "reference", "runtime")
        }
        return {**head, **own, "points": points, "notes": list(self.notes), "machines": dict(self.machines)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Sensitivity:
        """Result from what `to_dict` returns.

        Raises:
            SensitivityError: `data` is something else.
        """
        try:
            if (data["format"], data["kind"]) != (FORMAT, KIND):
                raise KeyError("format")
            own = {
                name: data[name]
                for name in ("model", "measure", "unit", "higher_is_better", "reference", "runtime", "machines")
            }
            points = tuple(point_of(point) for point in data["points"])
            return cls(points=points, notes=tuple(data.get("notes", ())), **own)
        except (KeyError, TypeError) as error:
            raise SensitivityError(f"no sensitivity of format {FORMAT}: {error}; measure it again") from error

    def save(self, path: str | Path) -> Path:
        """Write the result as JSON, and return the path."""
        write_json(Path(path), self.to_dict())
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> Sensitivity:
        """Result from a file that `save` or `torchslim sensitivity` wrote, or from the folder that holds it.

        Raises:
            SensitivityError: no such file, or something else in it.
        """
        path = Path(path)
        path = path / "sensitivity.json" if path.is_dir() else path
        try:
            return cls.from_dict(load_sensitivity(path))
        except (ArtifactError, ValueError) as error:
            raise SensitivityError(
                f"{path} cannot be read ({error}); write it with ts.sensitivity(...).save(path)"
            ) from error
        except SensitivityError as error:
            raise SensitivityError(f"{path} holds {error}") from error

    def table(self) -> str:
        """Text table with a row for each group and layer, and a column for each change."""
        lines = [f"{self.model}: {MEASURES[self.measure]}" + _reference(self)]
        for kind, title in (("channels", "channel groups, by the fraction removed"), ("layer", "layers")):
            points = [point for point in self.points if point.kind == kind]
            if not points:
                continue
            changes = list(dict.fromkeys(point.change for point in points))
            cells = {(point.name, point.change): point for point in points}
            names = list(dict.fromkeys(point.name for point in points))
            width = max(map(len, names))
            lines += ["", title, f"  {'':<{width}}  " + "  ".join(f"{change:>12}" for change in changes)]
            lines += [
                f"  {name:<{width}}  " + "  ".join(_cell(cells.get((name, change))) for change in changes)
                for name in names
            ]
            refused = dict.fromkeys((point.name, point.refused) for point in points if point.refused)
            lines += [f"  {name}: {why}" for name, why in refused]
        return "\n".join([*lines, *([""] if self.notes else []), *self.notes])

    def __str__(self) -> str:
        return self.table()


def _reference(sensitivity: Sensitivity) -> str:
    if sensitivity.measure != "metric" or sensitivity.reference is None:
        return ""
    return f" (unchanged: {sensitivity.reference:.4g} {sensitivity.unit})".replace(" )", ")")


def _cell(point: Point | None) -> str:
    if point is None:
        return f"{'':>12}"
    return f"{'refused':>12}" if point.value is None else f"{point.value:>12.4g}"


def percent(ratio: float) -> str:
    """A ratio as written in `Point.change`."""
    return f"{100 * ratio:.4g} %"


def point_of(row: Mapping[str, Any]) -> Point:
    return Point(**{**row, "groups": tuple(row.get("groups", ()))})
