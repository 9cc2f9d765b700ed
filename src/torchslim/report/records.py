"""Types of the files that reports read, for pydantic: no unknown keys, and every number has bounds.

Values are plain dicts where they are used. This module does not import pydantic, which is loaded to check a file.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, NotRequired

from annotated_types import Ge, Gt, Le, MaxLen, MinLen
from typing_extensions import TypedDict

from torchslim.core.budget import Objective

STRICT = {"extra": "forbid", "strict": True}
OPEN = {"extra": "allow", "strict": True}  # for tables that a user's own steps and metrics may extend
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
    """A ratio, and in words whether it differs from 1 by more than the noise."""

    __pydantic_config__ = STRICT  # type: ignore[misc]

    verdict: Text


class NotMeasured(TypedDict):
    """The reason why there is no number, in its place."""

    __pydantic_config__ = STRICT  # type: ignore[misc]

    not_measured: Text


Entry = Measured | NotMeasured
Ratio = Compared | NotMeasured


class Layer(TypedDict):
    """A `core.step.LayerRecord`."""

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
    """One attempt to cut a model to a latency ceiling."""

    __pydantic_config__ = OPEN  # type: ignore[misc]

    target: Number
    predicted: Number
    measured: NotRequired[Number | None]


class Cut(TypedDict):
    """The attempts for one latency ceiling; `best` counts the rounds from 1."""

    __pydantic_config__ = OPEN  # type: ignore[misc]

    ceiling: Number
    programs: Number
    elsewhere: Text
    rounds: Annotated[list[Round], MinLen(1)]
    best: Annotated[int, Ge(1)]


class Evidence(TypedDict):
    """Further findings of a step; a user's own steps may add any keys."""

    __pydantic_config__ = OPEN  # type: ignore[misc]

    latency: NotRequired[list[Cut]]


class StageRow(TypedDict):
    """A stage without its latency, as in `stage.json`."""

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
    """Speed-up over the baseline, and over the previous row."""

    __pydantic_config__ = STRICT  # type: ignore[misc]

    over_baseline: Ratio
    over_previous: Ratio


class Shrink(TypedDict):
    """How many times smaller than the baseline, and than the previous row."""

    __pydantic_config__ = STRICT  # type: ignore[misc]

    over_baseline: Entry
    over_previous: Entry


class Row(StageRow):
    """A stage, or the artifact, compared with the other rows, as in `run.json`."""

    __pydantic_config__ = STRICT  # type: ignore[misc]

    latency_ms: dict[Text, Entry]
    speedup: Speedup
    shrink: Shrink


class MetricOf(TypedDict):
    """Name, unit and direction of the metric."""

    __pydantic_config__ = STRICT  # type: ignore[misc]

    name: Text
    unit: Text
    higher_is_better: NotRequired[bool]


class TargetOf(TypedDict):
    """Runtime and threads of the deployed model."""

    __pydantic_config__ = STRICT  # type: ignore[misc]

    runtime: Text
    threads: NotRequired[Annotated[int, Gt(0)] | None]


class Machine(TypedDict):
    """Description of a machine, and the versions of packages on it."""

    __pydantic_config__ = OPEN  # type: ignore[misc]

    versions: NotRequired[dict[Text, Any]]


class RecipeOf(TypedDict):
    """The recipe of a run, in `recipe.json` and `run.json`; its steps are those of `core.fingerprint.canonical`."""

    __pydantic_config__ = STRICT  # type: ignore[misc]

    model: NotRequired[Text]
    task: NotRequired[Text]
    steps: list[Any]
    target: TargetOf
    seed: int


class BudgetOf(TypedDict):
    """Whether a search kept its bounds, with a text."""

    __pydantic_config__ = OPEN  # type: ignore[misc]

    met: bool
    text: Text


class Run(TypedDict):
    """Content of `run.json`."""

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


class SearchRange(TypedDict):
    """A parameter of a search between two numbers."""

    __pydantic_config__ = STRICT  # type: ignore[misc]

    name: Text
    kind: Literal["float", "int"]
    low: Number
    high: Number


class SearchChoice(TypedDict):
    """A parameter of a search with listed values."""

    __pydantic_config__ = STRICT  # type: ignore[misc]

    name: Text
    kind: Literal["choice"]
    choices: list[Any]


class SearchBudget(TypedDict):
    """Bounds of a search, by the fields of `core.budget.Budget`, which has more than these."""

    __pydantic_config__ = OPEN  # type: ignore[misc]

    metric_drop: NotRequired[Number]
    latency_ms: NotRequired[Number]
    size_mb: NotRequired[Number]
    peak_memory_mb: NotRequired[Number]
    macs: NotRequired[Number]
    params: NotRequired[Number]


class Trial(TypedDict):
    """A tried candidate."""

    __pydantic_config__ = STRICT  # type: ignore[misc]

    number: Count
    parameters: dict[Text, Any]
    state: Text
    stage: Text
    reason: Text
    figures: dict[Text, Number]
    within: bool
    seconds: Number


class Original(TypedDict):
    """Figures of a search's original model."""

    __pydantic_config__ = STRICT  # type: ignore[misc]

    metric: dict[Text, Entry]
    figures: dict[Text, Entry]


class FrontMember(Original):
    """A candidate that was trained fully and measured as an artifact; paths begin in the folder of the search."""

    __pydantic_config__ = STRICT  # type: ignore[misc]

    trial: Count
    parameters: dict[Text, Any]
    recipe: Text
    folder: NotRequired[Text]
    within: bool


class FailedFinal(TypedDict):
    """A candidate that could not be measured as an artifact."""

    __pydantic_config__ = STRICT  # type: ignore[misc]

    trial: Count
    reason: Text


class VerdictOf(TypedDict):
    """Whether a search kept its bounds, the nearest trial, and the bounds that this trial breaks."""

    __pydantic_config__ = STRICT  # type: ignore[misc]

    met: bool
    text: Text
    nearest: Count | None
    binding: list[Objective]


class SearchFile(TypedDict):
    """Content of `search.json`."""

    __pydantic_config__ = STRICT  # type: ignore[misc]

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
    front: list[FrontMember]
    verdict: VerdictOf
    machines: dict[Text, Machine]


class PointOf(TypedDict):
    """A change of one layer or channel group and its measured effect, as `analysis.result.Point`."""

    __pydantic_config__ = STRICT  # type: ignore[misc]

    name: Text
    kind: Literal["channels", "layer"]
    change: Text
    amount: NotRequired[Number | None]
    value: Number | None
    refused: Text
    groups: NotRequired[list[Text]]


class SensitivityFile(TypedDict):
    """Content of `sensitivity.json`."""

    __pydantic_config__ = STRICT  # type: ignore[misc]

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
