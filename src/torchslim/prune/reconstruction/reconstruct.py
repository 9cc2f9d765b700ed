"""Solves for the weights that remain after pruning, so that every layer gives what it gave before.

The layers follow each other in the order of the run. Each is fitted on the inputs that the pruned model really gives
it, with the layers before it solved for already, to the outputs that it has in the original model: least squares, as in
He, Zhang & Sun 2017 (arXiv:1707.06168, section 3.1) for channels and ZipLM (Kurtic et al. 2023, arXiv:2302.04089).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from torchslim.core.batches import Batch, Outputs, batch_mask, checked
from torchslim.core.isolation import preserved_globals
from torchslim.core.train_modes import eval_mode
from torchslim.core.trees import device_of, to_device
from torchslim.prune.dependency.trace import elementary
from torchslim.prune.reconstruction.padding import Order, row_orders, valid_rows
from torchslim.prune.reconstruction.solve import Sums, solve
from torchslim.prune.reconstruction.uses import Enough, Others, Use, Watch
from torchslim.prune.structured.surgery import Cut

LEAST_ROWS, ROWS_PER_FEATURE = 65_536, 32
"""Rows that are used of all data: at least the first number, or this many per feature; a seeded sample of more."""

MOST_BYTES = 2**31
"""The largest Gram matrices of one layer."""

CHUNK = 2**22
"""Elements of the features that are gathered at once."""

HELD = 5
"""Every fifth batch is held out; of fewer batches the last fifth of each operation's rows."""

UNCHANGED = 1e-20
"""Outputs whose squared difference is smaller than this, relative to the outputs, are equal."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Solved:
    """What became of one weight: squared errors of its output over the output's squares, on held-out data."""

    weight: str
    before: float = 0.0
    after: float = 0.0
    reason: str = ""  # why it is left as it was; empty if it is updated

    def __str__(self) -> str:
        if self.reason:
            return f"not reconstructed: {self.reason}"
        return f"reconstructed: the error of its output {self.before:.3g} -> {self.after:.3g}"


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Calibration data, and how a model runs on them."""

    batches: Sequence[Batch]
    forward: Callable[[nn.Module, Batch], Outputs]
    mask: Callable[[Batch], Tensor | None] = batch_mask


@dataclass
class _Reader:
    """One set of elements of a weight that an operation multiplies with, in both models."""

    key: tuple[Any, ...]
    weight: str
    columns: Tensor  # of the original's outputs: those that the pruned model has
    bias: str | None
    order: Order | None


@dataclass
class _Survey:
    """The uses of one model on all batches."""

    keys: list[dict[str, list[tuple[Any, ...]]]] = field(default_factory=list)  # by batch and weight, in order
    first: dict[tuple[Any, ...], Use] = field(default_factory=dict)  # without its data
    others: Others = field(default_factory=Others)


@torch.no_grad()
def reconstruct(
    original: nn.Module,
    pruned: nn.Module,
    data: Calibration,
    *,
    cuts: Iterable[Cut] = (),
    masks: Mapping[str, Tensor] | None = None,
    only: Iterable[str] | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> list[Solved]:
    """Update the weights and biases of `pruned`, in place; returns what became of each weight whose output differs.

    An update that does not lower the error on held-out data is not made.

    Args:
        original: the model before pruning; only read.
        pruned: its pruned form, with parameters of the same names.
        data: both models run on it, several times for each layer.
        cuts: the removed slices, by which the original's parameters become those of the pruned model.
        masks: weights of the pruned model that stay zero, by parameter; True where kept.
        only: names of the parameters that may change; None: all.
        seed: of the sample of rows, where there are very many.
        progress: called with the number of layers that are done, and of all.
    """
    with _running(original), _running(pruned), preserved_globals(seed):
        run = _Run(original, pruned, data, masks or {}, seed, None if only is None else frozenset(only))
        origins = _origins(original, cuts)
        solved = list(run.refusals())
        readers = list(run.readers(origins))
        for number, reader in enumerate(readers):
            if progress is not None:
                progress(number, len(readers))
            result = run.solve(reader)
            if result is not None:
                solved.append(result)
    return solved


@contextmanager
def _running(model: nn.Module) -> Iterator[None]:
    """Run in eval mode with elementary operations; the buffers, such as counters of calls, are restored."""
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    with ExitStack() as stack:
        if any(isinstance(module, nn.RNNBase) for module in model.modules()):
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))  # its kernels hide the products
        stack.enter_context(elementary(model))
        stack.enter_context(eval_mode(model))
        try:
            yield
        finally:
            for buffer, value in buffers:
                buffer.copy_(value)


def _origins(original: nn.Module, cuts: Iterable[Cut]) -> dict[str, Tensor]:
    """For each parameter of the pruned model, the flat index of its elements in the original's parameter."""
    parameters = dict(original.named_parameters())
    origins: dict[str, Tensor] = {}
    for cut in cuts:
        if cut.weight in parameters:
            index = origins.get(cut.weight, _flat(parameters[cut.weight]))
            origins[cut.weight] = index.index_select(cut.dim, torch.tensor(cut.kept, device=index.device))
    return origins


def _flat(tensor: Tensor) -> Tensor:
    return torch.arange(tensor.numel(), device=tensor.device).view(tensor.shape)


class _Run:
    """Both models on the data."""

    def __init__(
        self,
        original: nn.Module,
        pruned: nn.Module,
        data: Calibration,
        masks: Mapping[str, Tensor],
        seed: int,
        only: frozenset[str] | None,
    ) -> None:
        self.only = only
        self.original, self.pruned, self.data, self.masks, self.seed = original, pruned, data, masks, seed
        self.device = device_of(pruned)
        self.batches = list(checked(data.batches, "batches"))
        self.parameters = dict(pruned.named_parameters())
        self.before, self.now = self._survey(original), self._survey(pruned)
        self.orders: Mapping[tuple[Any, ...], Order] = {}
        mask = data.mask(self._on_device(self.batches[0]))
        if mask is not None:
            self.orders = row_orders(pruned, self._on_device(self.batches[0]), mask, data.forward)

    def _on_device(self, batch: Batch) -> Batch:
        return to_device(batch, self.device)

    def _survey(self, model: nn.Module) -> _Survey:
        survey = _Survey()
        for batch in self.batches:
            keys: dict[str, list[tuple[Any, ...]]] = {}

            def note(use: Use, keys: dict[str, list[tuple[Any, ...]]] = keys) -> None:
                keys.setdefault(use.weight, []).append(use.key)
                survey.first.setdefault(use.key, _without_data(use))

            with Watch(model, note, others=survey.others):
                self.data.forward(model, self._on_device(batch))
            survey.keys.append(keys)
        return survey

    def refusals(self) -> Iterator[Solved]:
        """Weights that are multiplied with, and are read in another way too."""
        for name in dict.fromkeys(key[0] for key in self.now.first):
            if not self._may_change(name):
                continue
            reason = self.now.others.reasons.get(name) or self._mismatch(name)
            if reason:
                yield Solved(weight=name, reason=reason)

    def _may_change(self, name: str) -> bool:
        return self.only is None or name in self.only

    def _mismatch(self, name: str) -> str:
        """Why the uses of a weight in both models do not correspond; empty if they do."""
        pairs = [
            (before.get(name, []), now.get(name, []))
            for before, now in zip(self.before.keys, self.now.keys, strict=True)
        ]
        if any(len(before) != len(now) for before, now in pairs):
            return "the models use it a different number of times"
        if len({pair for before, now in pairs for pair in zip(before, now, strict=True)}) != len(self._keys(name)):
            return "the models use different parts of it"
        parts = [self.now.first[key] for key in self._keys(name)]
        indices = torch.cat([part.matrix(_flat(part.parameter)).reshape(-1) for part in parts])
        if len(indices.unique()) != len(indices):
            return "parts of it that overlap are used"
        return ""

    def _keys(self, name: str) -> list[tuple[Any, ...]]:
        return [key for key in self.now.first if key[0] == name]

    def readers(self, origins: Mapping[str, Tensor]) -> Iterator[_Reader]:
        """What can be solved for, in the order of the run."""
        refused = {solved.weight for solved in self.refusals()}
        for key, use in self.now.first.items():
            if use.weight in refused or not self._may_change(use.weight):
                continue
            before = next(
                was[use.weight][now[use.weight].index(key)]
                for was, now in zip(self.before.keys, self.now.keys, strict=True)
                if key in now.get(use.weight, ())
            )
            columns = _columns(self.before.first[before], use, origins.get(use.weight))
            if columns is not None:
                yield _Reader(key, use.weight, columns, self._bias(use), self.orders.get(key))

    def _bias(self, use: Use) -> str | None:
        """The bias, if nothing else uses it."""
        others = self.now.others
        alone = use.bias is not None and others.biases[use.bias] == {use.key} and use.bias not in others.reasons
        return use.bias if use.bias is not None and alone and self._may_change(use.bias) else None

    def solve(self, reader: _Reader) -> Solved | None:
        """Fit one weight; None if its output is that of the original."""
        use = self.now.first[reader.key]
        weight = use.matrix(self.parameters[reader.weight].detach())
        groups, features, outputs = weight.shape
        size = features + (reader.bias is not None)
        if 2 * 8 * groups * size * (size + outputs) > MOST_BYTES:
            return Solved(
                weight=reader.weight, reason=f"{groups} Gram matrices of {size} features need too much memory"
            )
        device = weight.device if weight.device.type != "mps" else torch.device("cpu")  # mps has no float64
        fit, held = (Sums.empty(groups, size, outputs, device) for _ in range(2))
        for number in range(len(self.batches)):
            self._add(number, reader, size, fit, held)
            if number == 0 and fit.squares + held.squares <= UNCHANGED * (fit.target + held.target):
                return None
        if not fit.rows or not held.rows:
            return Solved(weight=reader.weight, reason="too few samples to hold some out")
        solution = solve(fit, held, self._support(reader, use, device))
        if solution.update is None:
            reason = "no update lowers the error on held-out data"
            return Solved(weight=reader.weight, before=solution.before, after=solution.after, reason=reason)
        use.write((weight.double().to(device) + solution.update[:, :features]).to(weight))
        if reader.bias is not None:
            bias = self.parameters[reader.bias]
            bias.copy_((bias.double().to(device) + solution.update[:, features].reshape(-1)).to(bias))
        return Solved(weight=reader.weight, before=solution.before, after=solution.after)

    def _support(self, reader: _Reader, use: Use, device: torch.device) -> Tensor | None:
        """The elements that may change, with the bias as the last feature; None for all."""
        mask = self.masks.get(reader.weight)
        if mask is None or bool(mask.all()):
            return None
        support = use.matrix(mask.to(use.view.device)).to(device)
        if reader.bias is None:
            return support
        bias = self.masks.get(reader.bias, torch.ones(support.shape[0] * support.shape[2], dtype=torch.bool))
        return torch.cat([support, bias.to(device).view(support.shape[0], 1, -1)], 1)

    def _add(self, number: int, reader: _Reader, size: int, fit: Sums, held: Sums) -> None:
        """Add the rows of one batch."""
        batch = self._on_device(self.batches[number])
        mask = self.data.mask(batch)
        places = [place for place, key in enumerate(self.now.keys[number].get(reader.weight, ())) if key == reader.key]
        if not places:
            return
        needed = {reader.weight: places[-1] + 1}
        targets: dict[int, Tensor] = {}
        count: Counter[str] = Counter()

        def keep(use: Use) -> None:
            if use.weight == reader.weight:
                if count["before"] in places:
                    channels = 1 if use.convolution else use.made.dim() - 1
                    targets[count["before"]] = use.made.index_select(channels, reader.columns)
                count["before"] += 1

        def add(use: Use) -> None:
            if use.weight == reader.weight:
                if count["now"] in places:
                    self._add_use(number, reader, size, use, targets.pop(count["now"]), mask, (fit, held))
                count["now"] += 1

        for model, heard in ((self.original, keep), (self.pruned, add)):
            with suppress(Enough), Watch(model, heard, needed):
                self.data.forward(model, batch)

    def _add_use(
        self,
        number: int,
        reader: _Reader,
        size: int,
        use: Use,
        target: Tensor,
        mask: Tensor | None,
        sums: tuple[Sums, Sums],
    ) -> None:
        """Add the rows of one operation: a sample of them where all operations have more than needed."""
        if target.shape != use.made.shape:
            return  # sizes that depend on data
        rows = valid_rows(use, mask, reader.order)
        calls = sum(keys.get(reader.weight, []).count(reader.key) for keys in self.now.keys)
        most = max(max(LEAST_ROWS, ROWS_PER_FEATURE * size) // calls, HELD)
        if len(rows) > most:
            generator = torch.Generator().manual_seed(self.seed + number)
            chosen = torch.randperm(len(rows), generator=generator)[:most].sort().values
            rows = rows[chosen.to(rows.device)]
        if len(self.batches) >= HELD:
            parts = [(sums[number % HELD == HELD - 1], rows)]
        else:
            cut = len(rows) - len(rows) // HELD
            parts = [(sums[0], rows[:cut]), (sums[1], rows[cut:])]
        wanted = Use(use.weight, use.parameter, use.view, use.given, target, use.bias, use.convolution)
        for total, chosen_rows in parts:
            groups = total.gram.shape[0]
            for piece in chosen_rows.split(max(CHUNK // (groups * size), 1)):
                if not len(piece):
                    continue
                features, made, goal = (
                    value.to(total.gram.device, torch.float64)
                    for value in (use.features(piece), use.outputs(piece), wanted.outputs(piece))
                )
                if reader.bias is not None:
                    features = torch.cat([features, features.new_ones(len(piece), groups, 1)], 2)
                made, goal = (value.reshape(len(piece), groups, -1) for value in (made, goal))
                total.add(features, goal - made, goal)


def _without_data(use: Use) -> Use:
    """The use without its tensors of data, which would stay in memory."""
    nothing = use.view.new_empty(0)
    return Use(use.weight, use.parameter, use.view, nothing, nothing, use.bias, use.convolution)


def _columns(before: Use, now: Use, origin: Tensor | None) -> Tensor | None:
    """The outputs of the original use that the pruned use has, in its order; None if it has others."""
    indices = before.matrix(_flat(before.parameter))
    groups, _, outputs = indices.shape
    channel = torch.arange(groups * outputs, device=indices.device).view(groups, 1, outputs)
    column_of = torch.full((before.parameter.numel(),), -1, device=indices.device)
    column_of[indices] = channel.expand_as(indices)
    kept = now.matrix(_flat(now.parameter) if origin is None else origin)
    columns = column_of[kept[:, 0].reshape(-1)]
    return None if bool((columns < 0).any()) else columns
