"""What `run.json` and `stage.json` hold, as types that pydantic checks: no unknown keys, no number without bounds.

They are plain dicts where they are used. Nothing here imports pydantic: it is loaded where a file is checked.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, NotRequired

from annotated_types import Ge, Gt, Le, MaxLen, MinLen
from typing_extensions import TypedDict

STRICT = {"extra": "forbid", "strict": True}
OPEN = {"extra": "allow", "strict": True}  # what steps of the user's own, and their metrics, may add to
LONGEST = 100_000  # characters of a text: a reason may quote a compiler

Text = Annotated[str, MaxLen(LONGEST)]
Figure = Annotated[float, Ge(-1e40), Le(1e40)]  # a loss in float32 may be that large
Number = Figure | Annotated[int, Ge(-(2**63)), Le(2**63 - 1)]
Count = Annotated[int, Ge(0), Le(2**63 - 1)]


class Measured(TypedDict):
    """A number with its unit; `low` and `high` are p10 and p90 of `repeats` values."""

    __pydantic_config__ = STRICT  # type: ignore[misc]

    value: Number
    unit: Text
    repeats: Count
    low: NotRequired[Number]
    high: NotRequired[Number]
    machine: NotRequired[Text]


class Compared(Measured):
    """A ratio, and in words whether it lies outside of the noise."""

    __pydantic_config__ = STRICT  # type: ignore[misc]

    verdict: Text


class NotMeasured(TypedDict):
    """In a number's place, with the reason."""

    __pydantic_config__ = STRICT  # type: ignore[misc]

    not_measured: Text


Entry = Measured | NotMeasured
Ratio = Compared | NotMeasured


class Layer(TypedDict):
    """A `steps.LayerRecord`."""

    __pydantic_config__ = STRICT  # type: ignore[misc]

    version: Count
    layer: Text
    action: Text
    reason: Text
    sparsity: NotRequired[Number | None]
    weight_bits: NotRequired[Number | None]
    activation_bits: NotRequired[Number | None]
    sqnr_db: NotRequired[Number | None]
    kernel: NotRequired[Text]
    integer: NotRequired[bool | None]


class Round(TypedDict):
    """One cut on the way to a ceiling of latency."""

    __pydantic_config__ = OPEN  # type: ignore[misc]

    target: Number
    predicted: Number
    measured: NotRequired[Number | None]


class Cut(TypedDict):
    """The cuts to one ceiling of latency; `best` counts the rounds from 1."""

    __pydantic_config__ = OPEN  # type: ignore[misc]

    ceiling: Number
    programs: Number
    elsewhere: Text
    rounds: Annotated[list[Round], MinLen(1)]
    best: Annotated[int, Ge(1)]


class Evidence(TypedDict):
    """What a step found out besides; steps of the user's own add what they like."""

    __pydantic_config__ = OPEN  # type: ignore[misc]

    latency: NotRequired[list[Cut]]


class StageRow(TypedDict):
    """A stage, before its latency is known: in `stage.json`."""

    __pydantic_config__ = STRICT  # type: ignore[misc]

    name: Text
    kind: Text
    metric: dict[Text, Entry]
    parameters: Entry
    nonzero: Entry
    macs: Entry
    size_bytes: Entry
    seconds: Entry
    layers: list[Layer]
    warnings: list[Text]
    history: list[dict[Text, Number]]
    evidence: NotRequired[Evidence]


class Speedup(TypedDict):
    """Times over those of the baseline, and of the row before."""

    __pydantic_config__ = STRICT  # type: ignore[misc]

    over_baseline: Ratio
    over_previous: Ratio


class Shrink(TypedDict):
    """Times smaller than the baseline, and than the row before."""

    __pydantic_config__ = STRICT  # type: ignore[misc]

    over_baseline: Entry
    over_previous: Entry


class Row(StageRow):
    """A stage, or the artifact, beside the others: in `run.json`."""

    __pydantic_config__ = STRICT  # type: ignore[misc]

    latency_ms: dict[Text, Entry]
    speedup: Speedup
    shrink: Shrink


class MetricOf(TypedDict):
    """What the metric is called, and which way it is better."""

    __pydantic_config__ = STRICT  # type: ignore[misc]

    name: Text
    unit: Text
    higher_is_better: NotRequired[bool]


class TargetOf(TypedDict):
    """Where the model runs."""

    __pydantic_config__ = STRICT  # type: ignore[misc]

    runtime: Text
    threads: NotRequired[Annotated[int, Gt(0)] | None]


class Machine(TypedDict):
    """What a machine is called, and the versions of packages on it."""

    __pydantic_config__ = OPEN  # type: ignore[misc]

    versions: NotRequired[dict[Text, Any]]


class RecipeOf(TypedDict):
    """What a run was asked for: in `recipe.json`, and in `run.json`. Its steps are as `steps.canonical` gives them."""

    __pydantic_config__ = STRICT  # type: ignore[misc]

    model: NotRequired[Text]
    task: NotRequired[Text]
    steps: list[Any]
    target: TargetOf
    seed: int


class BudgetOf(TypedDict):
    """Whether a search kept its bounds, in words."""

    __pydantic_config__ = OPEN  # type: ignore[misc]

    met: bool
    text: Text


class Run(TypedDict):
    """A `run.json`."""

    __pydantic_config__ = STRICT  # type: ignore[misc]

    format: Literal[1]
    kind: NotRequired[Literal["run"]]
    torchslim: Text
    recipe: dict[Text, Any]
    metric: MetricOf
    target: TargetOf
    selected_on: Text
    reported_on: Text
    batch: Text | Number
    machines: dict[Text, Machine]
    rows: Annotated[list[Row], MinLen(1)]
    budget: NotRequired[BudgetOf]
