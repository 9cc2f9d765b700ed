"""The pruning step: one recipe key for weights that become zero and for channels that are removed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from torch import Tensor, nn

from torchslim.core.batches import Batch
from torchslim.core.checks import check_fields
from torchslim.core.fingerprint import canonical
from torchslim.core.step import Context, Form, LayerRecord, Outcome, Step
from torchslim.errors import PruneError
from torchslim.prune.block_step import PruneBlocks
from torchslim.prune.channel_step import PruneChannels, SparsePenalty
from torchslim.prune.criteria.gathering import gather_for
from torchslim.prune.criteria.registry import Criterion, Scorer, find_criterion
from torchslim.prune.criteria.scoring import Normalization, Reduction
from torchslim.prune.criteria.statistics import Gathered
from torchslim.prune.dependency.resolve import Heads
from torchslim.prune.depth.plan import BlockMeasure
from torchslim.prune.masking.masks import NO_DATA, Masks
from torchslim.prune.masking.patterns import BLOCK, CHANNEL, Order
from torchslim.prune.schedule import Schedule, ScheduleKind
from torchslim.prune.structured.options import ChannelOptions
from torchslim.prune.structured.penalties import Sparsify
from torchslim.prune.structured.plan import UnseenCode
from torchslim.prune.structured.selection import Of, amount_of
from torchslim.prune.weight_step import PruneWeights
from torchslim.training.finetune import Training

WEIGHTS = ("sparsity", "threshold", "criterion", "n", "dim", "scope", "include", "exclude", "reconstruct")
"""Fields that are passed to `PruneWeights` unchanged."""

AMOUNT = ("of", "scope", "round_to", "min_channels", "widths")
"""Fields that are passed to `Amount` unchanged."""

OPTIONS = ("criterion", "heads", "include", "exclude", "reduction", "normalization", "unseen")
"""Fields that are passed to `ChannelOptions` unchanged."""

BLOCKS = ("sparsity", "blocks", "of", "criterion", "include", "exclude", "reconstruct")
"""Fields that are passed to `PruneBlocks` unchanged."""

CHANNELS_ONLY = (
    "heads",
    "reduction",
    "normalization",
    "sparsify",
    "strength",
    "sparsify_train",
    "latency_table",
    "unseen",
    "widths",
    "of",
    "round_to",
    "min_channels",
)
"""Fields that are None unless the pattern is "channel"; "block" takes `of` as well."""


@dataclass(frozen=True, kw_only=True)
class Prune:
    """Set the least important weights to zero, or with the patterns "channel" and "block" remove channels or blocks.

    Args:
        sparsity: fraction of the chosen weights to remove; or a fraction per layer, {"conv1": 0.3, "layer4.*": 0.8},
            where later patterns override earlier ones and layers without a pattern are not pruned. For channels one
            number: a fraction of the model that the step receives.
        widths: channels only: instead of a sparsity, the number of channels that groups keep, by the name of a layer or
            of a member as `ts.prune.inspect` lists it: {"layer1.0.conv1": 48, "layer4.*": 256}. Groups without a name
            stay as they are. `round_to` and `min_channels` are checked if they are given.
        threshold: instead of a sparsity, remove the weights that score below this threshold.
        criterion: a name of `CRITERIA`, a `Criterion`, a function (weight, statistics) -> scores, or
            "package.module:name"; by default "l1" for weights and "lamp" for channels. A criterion that needs data gets
            the task's `calibration`, by default the first 512 samples of train. Criteria that rank only channels need
            the pattern "slice" or "channel". For blocks a name in `BLOCK_CRITERIA`, or a function (outputs before,
            outputs after) -> damage; by default "kl" where the labels are classes, else "error".
        pattern: "unstructured"; "slice", whole slices along `dim` by their L_`n` norm; "N:M", such as "2:4"; or
            "channel", which physically removes channels, neurons and heads with all slices coupled to them; or "block",
            which physically removes whole residual blocks, such as the layers of a transformer.
        scope: rank the weights of all chosen layers together ("global") or of every layer separately ("layer").
            Sparsities given per layer always rank per layer.
        include: globs over layer or parameter paths, or "type:Linear".
        exclude: likewise, for layers that keep all their weights.
        reconstruct: solve for the weights that remain, layer by layer, after every removal: the least squares that
            bring each layer's output on the task's `calibration` nearest to what it was. Updates that do not lower the
            error on held-out samples are not made. Not with the schedule "gradual".
        schedule: "one-shot"; "iterative" (`rounds` of pruning and training); "gradual" (a cubic rise over
            the fraction `until` of the training; weights only). The last two need `train`; for the first it is
            optional.
        train: Finetune(...) or Distill(...).
        blocks: blocks only: instead of a sparsity, names or globs of blocks as `ts.prune.inspect` lists them.
        of: as for `ts.prune.channels` or `ts.prune.blocks`; "latency" is measured on the run's target, with the model
            in the scheme that the recipe ends with.
        round_to: channels only, as for `ts.prune.channels`.
        min_channels: channels only, as for `ts.prune.channels`.
        heads: channels only, as for `ts.prune.channels`.
        reduction: channels only, as for `ts.prune.channels`.
        normalization: channels only, as for `ts.prune.channels`.
        sparsify: channels only: the penalty "group-lasso" or "bn-l1", times `strength` (1e-4), is added to the loss of
            a training before the first cut (`sparsify_train`, or else `train`) and of the trainings between rounds.
        unseen: channels only, as for `ts.prune.channels`; the task's `examples` are the further calls of the model.
        latency_table: with of="latency", path of a `latency.json` with times measured on another machine, used
            instead of measuring here.
    """

    accepts: ClassVar[Form] = Form.MODULE
    produces: ClassVar[Form] = Form.MODULE

    sparsity: float | Mapping[str, float] | None = None
    threshold: float | None = None
    criterion: str | Criterion | Scorer | None = None
    pattern: str = "unstructured"
    n: Order = 2.0
    dim: int = 0
    scope: Literal["global", "layer"] | None = None
    include: str | tuple[str, ...] | None = None
    exclude: str | tuple[str, ...] | None = None
    reconstruct: bool = False
    schedule: ScheduleKind = "one-shot"
    rounds: int = 3
    until: float = 0.75
    train: Training | None = None
    of: Of | BlockMeasure | None = None
    round_to: int | None = None
    min_channels: int | None = None
    heads: Heads | None = None
    reduction: Reduction | None = None
    normalization: Normalization | None = None
    sparsify: Sparsify | None = None
    strength: float | None = None
    sparsify_train: Training | None = None
    latency_table: str | None = None
    unseen: UnseenCode | None = None
    widths: Mapping[str, int] | None = None
    blocks: str | tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        check_fields(self, PruneError)
        self._check_mode()
        self.method()

    def method(self) -> PruneWeights | PruneChannels | PruneBlocks:
        """The step for the pattern, with its defaults filled in."""
        if self.pattern == BLOCK:
            return PruneBlocks(schedule=self._schedule(), **self._given(*BLOCKS))
        return self.channels() if self.pattern == CHANNEL else self.weights()

    def weights(self) -> PruneWeights:
        """The step that sets single weights to zero."""
        return PruneWeights(pattern=self.pattern, schedule=self._schedule(), **self._given(*WEIGHTS))

    def channels(self) -> PruneChannels:
        """The step that removes channels."""
        if self.sparsity is None and self.widths is None:
            raise PruneError(
                "nothing to do: give sparsity=... (the fraction removed), or widths=... (the channels kept)"
            )
        if self.sparsity is not None and self.widths is not None:
            raise PruneError(f"give sparsity or widths, not both: {self.sparsity}, {dict(self.widths)}")
        sparsity = None if isinstance(self.sparsity, Mapping) else self.sparsity  # refused by `_check_mode`
        return PruneChannels(
            options=ChannelOptions(
                amount=amount_of(sparsity=sparsity, **self._given(*AMOUNT)), **self._given(*OPTIONS)
            ),
            schedule=self._schedule(),
            penalty=self._penalty(),
            latency_table=self.latency_table,
            reconstruct=self.reconstruct,
        )

    def _check_mode(self) -> None:
        """Raise for fields that do not apply to the pattern."""
        if self.blocks is not None and self.pattern != BLOCK:
            raise PruneError(f"blocks is for pattern 'block', got pattern {self.pattern!r}; leave blocks out")
        if self.pattern != CHANNEL:
            for name in CHANNELS_ONLY:
                if getattr(self, name) is not None and (name, self.pattern) != ("of", BLOCK):
                    raise PruneError(f"{name} is for pattern 'channel', got pattern {self.pattern!r}; leave {name} out")
        if self.pattern not in (CHANNEL, BLOCK):
            return
        if self.threshold is not None or isinstance(self.sparsity, Mapping):
            argument = f"sparsity={self.sparsity}" if self.threshold is None else f"threshold={self.threshold}"
            why = ", as layers share their channels" if self.pattern == CHANNEL else ""
            raise PruneError(
                f"pattern {self.pattern!r} takes one sparsity{why}; got {argument}; choose layers with include and "
                "exclude"
            )
        if self.pattern == BLOCK and (self.scope is not None or isinstance(self.criterion, Criterion)):
            argument = f"scope={self.scope!r}" if self.scope is not None else "a Criterion of weights"
            raise PruneError(f"pattern 'block' ranks blocks by what the outputs lose, got {argument}; leave it out")
        for name, default in (("n", 2.0), ("dim", 0)):
            if getattr(self, name) != default:
                raise PruneError(f"{name} is for pattern 'slice', got {getattr(self, name)!r}; leave {name} out")
        if self.sparsify is None and (self.strength is not None or self.sparsify_train is not None):
            raise PruneError("strength and sparsify_train belong to sparsify='group-lasso' or 'bn-l1'; give it too")

    def _given(self, *names: str) -> dict[str, Any]:
        """Fields among `names` that are not None, with their values."""
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def _schedule(self) -> Schedule:
        return Schedule(kind=self.schedule, rounds=self.rounds, until=self.until, train=self.train)

    def _penalty(self) -> SparsePenalty | None:
        if self.sparsify is None:
            return None
        return SparsePenalty(kind=self.sparsify, train=self.sparsify_train or self.train, **self._given("strength"))

    def gather(self, model: nn.Module, ctx: Context, batches: Iterable[Batch] | None = None) -> Gathered:
        """Statistics that the criterion needs, of the model as it is now on the task's data."""
        criterion = self.channels().options.criterion if self.pattern == CHANNEL else self.weights().criterion
        return gather_for(find_criterion(criterion), model, ctx, batches)

    def masks(
        self,
        model: nn.Module,
        previous: Mapping[str, Tensor],
        sparsity: float | Mapping[str, float] | None,
        seed: int,
        gathered: Gathered = NO_DATA,
    ) -> tuple[Masks, list[LayerRecord]]:
        """Masks (True where kept) at `sparsity`, and a record per layer; `model` is only read."""
        return self.weights().masks(model, previous, sparsity, seed, gathered)

    def trainings(self) -> list[int]:
        """Number of epochs of each training: the one before the first cut, then those of the schedule."""
        penalty = self._penalty()
        sparsify_epochs = penalty.train.trainings() if penalty is not None and penalty.train is not None else []
        rounds = self.rounds if self.schedule == "iterative" else 1
        return [*sparsify_epochs, *([] if self.train is None else self.train.trainings() * rounds)]

    def timed_programs(self, model: nn.Module, ctx: Context) -> Mapping[str, int]:
        """Number of narrowed programs that are timed with of="latency", by the path of the part; empty otherwise."""
        return self.channels().timed_programs(model, ctx) if self.pattern == CHANNEL else {}

    def rehearsed(self, folder: Path) -> Self:
        """Return the same pruning in one round, with trainings of one epoch.

        Widths for a latency are chosen by MACs, unless a table has the times: timing hundreds of programs is no
        rehearsal.
        """
        trainings = {
            name: training.rehearsed(folder)
            for name in ("train", "sparsify_train")
            if (training := getattr(self, name)) is not None
        }
        of: Of | BlockMeasure | None = "macs" if self.of == "latency" and self.latency_table is None else self.of
        return replace(self, rounds=1, of=of, **trainings)

    def check(self, ctx: Context) -> None:
        """Raise if no layer matches, the criterion does not exist, or it or the training lacks its data."""
        self.method().check(ctx)

    def cache_inputs(self, steps: Sequence[Step]) -> list[Any]:
        """With of="latency" the whole recipe, whose scheme the timed models have, and the table's content."""
        if self.of != "latency":
            return []
        recipe = [canonical(step) for step in steps]
        if self.latency_table is None:
            return recipe
        table = Path(self.latency_table)
        return [*recipe, table.read_bytes() if table.is_file() else b""]

    def __call__(self, model: nn.Module, ctx: Context) -> Outcome:
        return self.method()(model, ctx)
