"""How sensitive a model is to each compression: what was measured, by layer or group."""

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
    """One change and what it does.

    Attributes:
        name: of the channel group, as "conv1.weight[0]", or of the layer.
        change: what was done to it: "25 %" of its channels removed, or the scheme it was quantized with.
        amount: the fraction of its channels that was removed; None for a layer.
        value: of the measure, None where it could not be built.
        refused: why not; empty otherwise.
        groups: all channel groups that lost channels in step.
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
        model: what it is called.
        measure: a name of `MEASURES`, in `unit`.
        reference: the measure of the unchanged model; None where it has none.
        runtime: whose profile the layers were quantized for.
        notes: what could not be looked at, and why.
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
        """How much a change hurts, 0 for not at all: noise over signal, nats, or what of the metric is lost."""
        if point.value is None:
            return None
        if self.measure == "sqnr":
            return float(10 ** (-point.value / 10))
        lost = point.value - (self.reference or 0.0)
        return max(-lost if self.higher_is_better else lost, 0.0)

    def priors(self) -> dict[str, float]:
        """Relative damage by channel group and by layer, each kind with mean 1: what `Context.priors` takes.

        Each ratio, and each scheme, counts as much as every other.
        """
        found: dict[str, float] = {}
        for kind in ("channels", "layer"):
            shares: dict[str, list[float]] = {}
            for change in dict.fromkeys(each.change for each in self.points if each.kind == kind):
                known: dict[str, list[float]] = {}
                for point in self.points:
                    if point.kind == kind and point.change == change and (hurt := self.damage(point)) is not None:
                        for name in point.groups or (point.name,):
                            known.setdefault(name, []).append(hurt)
                means = {name: sum(values) / len(values) for name, values in known.items()}
                mean = sum(means.values()) / max(len(means), 1)
                for name, value in means.items():
                    shares.setdefault(name, []).append(value / mean if mean else 1.0)
            rows = {name: sum(values) / len(values) for name, values in shares.items()}
            mean = sum(rows.values()) / max(len(rows), 1)
            found |= {name: value / mean for name, value in rows.items()}
        return found

    def most_sensitive(self, scheme: str) -> list[str]:
        """Layers by what a scheme does to them, the worst first.

        Raises:
            SensitivityError: the scheme was not measured.
        """
        rows = [
            (point, self.damage(point)) for point in self.points if point.kind == "layer" and point.change == scheme
        ]
        if not rows:
            known = dict.fromkeys(point.change for point in self.points if point.kind == "layer")
            raise SensitivityError(f"scheme {scheme!r} was not measured; there is {', '.join(known) or 'none'}")
        measured = [(each.name, hurt) for each, hurt in rows if hurt is not None]
        return [name for name, _ in sorted(measured, key=lambda row: -row[1])]

    def to_dict(self) -> dict[str, Any]:
        """As plain lists, numbers and text."""
        points = [{**asdict(point), "groups": list(point.groups)} for point in self.points]
        head = {"format": FORMAT, "kind": KIND, "torchslim": __version__}
        own = {
            name: getattr(self, name)
            for name in ("model", "measure", "unit", "higher_is_better", "reference", "runtime")
        }
        return {**head, **own, "points": points, "notes": list(self.notes), "machines": dict(self.machines)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Sensitivity:
        """The inverse of `to_dict`.

        Raises:
            SensitivityError: it is something else.
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
        """Write it as JSON."""
        write_json(Path(path), self.to_dict())
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> Sensitivity:
        """What `save` wrote, or `torchslim sensitivity`.

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
        """As text: a row for each group and layer, a column for each change."""
        lines = [f"{self.model}: {MEASURES[self.measure]}" + _reference(self)]
        for kind, title in (("channels", "channel groups, so much of them removed"), ("layer", "layers")):
            own = [point for point in self.points if point.kind == kind]
            if not own:
                continue
            changes = list(dict.fromkeys(each.change for each in own))
            cells = {(each.name, each.change): each for each in own}
            names = list(dict.fromkeys(each.name for each in own))
            width = max(map(len, names))
            lines += ["", title, f"  {'':<{width}}  " + "  ".join(f"{change:>12}" for change in changes)]
            lines += [
                f"  {name:<{width}}  " + "  ".join(_cell(cells.get((name, change))) for change in changes)
                for name in names
            ]
            refused = dict.fromkeys((each.name, each.refused) for each in own if each.refused)
            lines += [f"  {name}: {why}" for name, why in refused]
        return "\n".join([*lines, *([""] if self.notes else []), *self.notes])

    def __str__(self) -> str:
        return self.table()


def _reference(found: Sensitivity) -> str:
    if found.measure != "metric" or found.reference is None:
        return ""
    return f" (unchanged: {found.reference:.4g} {found.unit})".replace(" )", ")")


def _cell(point: Point | None) -> str:
    if point is None:
        return f"{'':>12}"
    return f"{'refused':>12}" if point.value is None else f"{point.value:>12.4g}"


def percent(ratio: float) -> str:
    """A ratio as points call it."""
    return f"{100 * ratio:.4g} %"


def point_of(row: Mapping[str, Any]) -> Point:
    return Point(**{**row, "groups": tuple(row.get("groups", ()))})
