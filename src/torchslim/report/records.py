"""Types of the files that reports read, for pydantic: no unknown keys, and every number has bounds.

Values are plain dicts of these types where they are used. This module does not import pydantic, which is loaded to
check a file.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, NotRequired, TypeVar

from annotated_types import Ge, Gt, Le, MaxLen, MinLen
from typing_extensions import TypedDict

from torchslim.core.budget import Objective

LONGEST = 100_000  # characters of a text: a reason may quote a compiler

Text = Annotated[str, MaxLen(LONGEST)]
Figure = Annotated[float, Ge(-1e40), Le(1e40)]  # a loss in float32 may be that large
Number = Figure | Annotated[int, Ge(-(2**63)), Le(2**63 - 1)]
Count = Annotated[int, Ge(0), Le(2**63 - 1)]
K = TypeVar("K")


def strict(kind: type[K]) -> type[K]:
    """Let pydantic refuse unknown keys of a TypedDict."""
    kind.__pydantic_config__ = {"extra": "forbid", "strict": True}  # type: ignore[attr-defined]
    return kind


def extensible(kind: type[K]) -> type[K]:
    """Let pydantic take unknown keys of a TypedDict, for tables that a user's own steps and metrics may extend."""
    kind.__pydantic_config__ = {"extra": "allow", "strict": True}  # type: ignore[attr-defined]
    return kind


@strict
class Measured(TypedDict):
    """A number with its unit; `low` and `high` are p10 and p90 of `repeats` values."""

    value: Number
    unit: Text
    repeats: Count
    low: NotRequired[Number]
    high: NotRequired[Number]
    machine: NotRequired[Text]


@strict
class Compared(Measured):
    """A ratio, and in words whether it differs from 1 by more than the noise."""

    verdict: Text


@strict
class NotMeasured(TypedDict):
    """The reason why there is no number, in its place."""

    not_measured: Text


Entry = Measured | NotMeasured
Ratio = Compared | NotMeasured


@strict
class Layer(TypedDict):
    """A `core.step.LayerRecord`."""

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


@extensible
class Round(TypedDict):
    """One attempt to cut a model to a latency ceiling."""

    target: Number
    predicted: Number
    measured: NotRequired[Number | None]


@extensible
class Cut(TypedDict):
    """The attempts for one latency ceiling; `best` counts the rounds from 1."""

    ceiling: Number
    programs: Number
    elsewhere: Text
    rounds: Annotated[list[Round], MinLen(1)]
    best: Annotated[int, Ge(1)]


@extensible
class FasterInFloat(TypedDict):
    """A choice of layers by latency, for one program."""

    in_float: Count
    layers: Count
    programs: Count
    latency_ms: Number | None
    float_ms: Number | None
    integer_ms: Number | None


@extensible
class Evidence(TypedDict):
    """Further findings of a step; a user's own steps may add any keys."""

    latency: NotRequired[list[Cut]]
    faster_in_float: NotRequired[dict[Text, FasterInFloat]]


@strict
class StageRow(TypedDict):
    """A stage without its latency, as in `stage.json`."""

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


@strict
class Speedup(TypedDict):
    """Speed-up over the baseline, and over the previous row."""

    over_baseline: Ratio
    over_previous: Ratio


@strict
class Shrink(TypedDict):
    """How many times smaller than the baseline, and than the previous row."""

    over_baseline: Entry
    over_previous: Entry


@strict
class Elsewhere(TypedDict):
    """Latency of a row on another machine, and its speed-up over the baseline there."""

    latency_ms: Measured
    over_baseline: Ratio
    threads: int | None
    inputs: list[list[Count]]


@strict
class Row(StageRow):
    """A stage, or the artifact, compared with the other rows, as in `run.json`.

    Where sizes vary, `latency_ms` and `speedup` are of the median-size inputs, and the figures of the largest inputs
    stand beside them. `elsewhere` has the figures of other machines, by name.
    """

    latency_ms: dict[Text, Entry]
    speedup: Speedup
    latency_largest_ms: NotRequired[dict[Text, Entry]]
    speedup_largest: NotRequired[Speedup]
    shrink: Shrink
    elsewhere: NotRequired[dict[Text, Elsewhere]]


@strict
class MetricOf(TypedDict):
    """Name, unit and direction of the metric."""

    name: Text
    unit: Text
    higher_is_better: NotRequired[bool]


@strict
class TargetOf(TypedDict):
    """Runtime and threads of the deployed model."""

    runtime: Text
    threads: NotRequired[Annotated[int, Gt(0)] | None]


@extensible
class Machine(TypedDict):
    """Description of a machine, and the versions of packages on it."""

    versions: NotRequired[dict[Text, Any]]


@strict
class RecipeOf(TypedDict):
    """The recipe of a run, in `recipe.json` and `run.json`; its steps are those of `core.fingerprint.canonical`."""

    model: NotRequired[Text]
    task: NotRequired[Text]
    steps: list[Any]
    target: TargetOf
    seed: int


@extensible
class BudgetOf(TypedDict):
    """Whether a search kept its bounds, with a text."""

    met: bool
    text: Text


@strict
class PartOf(TypedDict):
    """Expected seconds of a part of a run, all and those of its trainings, None where unknown; and those it took."""

    name: Text
    seconds: Number | None
    training: Number | None
    took: NotRequired[Number]


@strict
class ForecastOf(TypedDict):
    """Expected time of each part of a run, and the peak of memory in its rehearsal."""

    parts: list[PartOf]
    memory_mib: Number
    cuda_mib: NotRequired[Number]


@strict
class SizesOf(TypedDict):
    """Shapes of the timed inputs, where sizes vary."""

    median: Text
    largest: Text


@strict
class Run(TypedDict):
    """Content of `run.json`."""

    format: Literal[1]
    kind: NotRequired[Literal["run"]]
    torchslim: Text
    recipe: dict[Text, Any]
    metric: MetricOf
    target: TargetOf
    selected_on: Text
    reported_on: Text
    batch: Text | Number
    sizes: NotRequired[SizesOf]
    machines: dict[Text, Machine]
    rows: Annotated[list[Row], MinLen(1)]
    budget: NotRequired[BudgetOf]
    forecast: NotRequired[ForecastOf]


@strict
class SearchRange(TypedDict):
    """A parameter of a search between two numbers."""

    name: Text
    kind: Literal["float", "int"]
    low: Number
    high: Number


@strict
class SearchChoice(TypedDict):
    """A parameter of a search with listed values."""

    name: Text
    kind: Literal["choice"]
    choices: list[Any]


@extensible
class SearchBudget(TypedDict):
    """Bounds of a search, by the fields of `core.budget.Budget`, which has more than these."""

    metric_drop: NotRequired[Number]
    latency_ms: NotRequired[Number]
    size_mb: NotRequired[Number]
    peak_memory_mb: NotRequired[Number]
    macs: NotRequired[Number]
    params: NotRequired[Number]


@strict
class Trial(TypedDict):
    """A tried candidate."""

    number: Count
    parameters: dict[Text, Any]
    state: Text
    stage: Text
    reason: Text
    figures: dict[Text, Number]
    within: bool
    seconds: Number


@strict
class Original(TypedDict):
    """Figures of a search's original model."""

    metric: dict[Text, Entry]
    figures: dict[Text, Entry]


@strict
class Explained(TypedDict):
    """What a solver expected of a member of the front, what its choices bought, and what it refused, in words."""

    predicted: dict[Text, Number]
    bought: list[Text]
    refused: list[Text]


@strict
class FrontMember(Original):
    """A candidate that was trained fully and measured as an artifact; paths begin in the folder of the search."""

    trial: Count
    parameters: dict[Text, Any]
    recipe: Text
    folder: NotRequired[Text]
    within: bool
    explained: NotRequired[Explained]


@strict
class FailedFinal(TypedDict):
    """A candidate that could not be measured as an artifact."""

    trial: Count
    reason: Text


@strict
class VerdictOf(TypedDict):
    """Whether a search kept its bounds, the nearest trial, and the bounds that this trial breaks."""

    met: bool
    text: Text
    nearest: Count | None
    binding: list[Objective]


@strict
class SearchFile(TypedDict):
    """Content of `search.json`."""

    format: Literal[1]
    kind: Literal["search"]
    torchslim: Text
    recipe: dict[Text, Any]
    space: list[SearchRange | SearchChoice]
    budget: SearchBudget
    objectives: list[Objective]
    metric: MetricOf
    target: NotRequired[dict[Text, Any]]
    baseline: Original
    trials: list[Trial]
    failed: NotRequired[list[FailedFinal]]
    spent: NotRequired[dict[Text, Number]]  # seconds, and epochs of training, by what they were spent on
    front: list[FrontMember]
    verdict: VerdictOf
    machines: dict[Text, Machine]


@strict
class PointOf(TypedDict):
    """A change of one layer or channel group and its measured effect, as `analysis.result.Point`."""

    name: Text
    kind: Literal["channels", "layer"]
    change: Text
    amount: NotRequired[Number | None]
    value: Number | None
    refused: Text
    groups: NotRequired[list[Text]]


@strict
class SensitivityFile(TypedDict):
    """Content of `sensitivity.json`."""

    format: Literal[1]
    kind: Literal["sensitivity"]
    torchslim: Text
    model: Text
    measure: Text
    unit: Text
    higher_is_better: bool
    reference: Number | None
    runtime: Text
    points: list[PointOf]
    notes: NotRequired[list[Text]]
    machines: dict[Text, Machine]
