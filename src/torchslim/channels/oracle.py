"""Is a shrunk model right? It must equal the original with the removed elements zeroed after every operation.

Both models run operation by operation, in float64. The shrunk one runs first and leaves a few numbers of every value:
its shape, its norm and its product with a fixed random vector. The original follows with what was removed set to zero;
norms, softmax, means and the like see only what is kept. Each value, gathered, must leave the same numbers, so a swap
of two channels or a wrong attribute is found at the operation where it first shows, though the outputs may hide it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from torchslim.channels.groups import Coupling, Mask
from torchslim.channels.trace import Operation, Shape, Stack, Value, call, elementary, named_weights
from torchslim.channels.values import calm, digest, gathered, in_order, spread, zeroed
from torchslim.export import untouched
from torchslim.isolation import preserved_globals
from torchslim.steps import Inputs
from torchslim.task import tensors

TOLERANCE = 1e-6
"""Of float64 values, relative to their norm."""

COMPACT = frozenset({
    "native_layer_norm", "_fused_rms_norm", "native_group_norm", "native_batch_norm", "_native_batch_norm_legit",
    "cudnn_batch_norm", "_softmax", "_log_softmax", "_safe_softmax", "mean", "var", "std", "var_mean", "std_mean",
    "amax", "amin", "max", "min", "prod", "logsumexp", "argmax", "argmin", "all", "cumprod", "aminmax", "logcumsumexp",
})  # fmt: skip
"""Operations to which a zero is not as good as nothing: the masked run gives them only what is kept."""

PASSING = frozenset({
    "clone", "alias", "detach", "empty", "as_strided_", "expand", "contiguous", "lift_fresh", "_to_copy",
})  # fmt: skip
"""Operations that come and go with memory layout and precision; the runs are not compared at them."""

LOW = frozenset({torch.float32, torch.float16, torch.bfloat16})
"""What the model may cast to; the check stays in float64."""

RANDOM = frozenset({"rand", "randn", "rand_like", "randn_like", "bernoulli", "bernoulli_", "uniform_", "normal_",
                    "normal", "randint", "multinomial", "randperm", "exponential_", "random_"})  # fmt: skip
COUNTING = frozenset({"nms", "nonzero", "masked_select", "unique_dim", "_unique2", "unique_consecutive"})
"""Operations of which the data decides how much comes out."""

SCALING = frozenset({"mul", "div"})
"""Operations whose whole numbers may be sizes."""

SORTING = frozenset({"sort", "topk", "nms"})
"""Operations that decide by comparing: rounding may turn near ties."""

NAMES = {"_unsafe_view": "view", "_reshape_alias": "view"}
POWERS = (1.0, 0.5, 0.25)


@dataclass(frozen=True, slots=True)
class Divergence:
    """Where a run first left the prediction."""

    index: int  # of the operation in the trace
    path: str  # the module at work
    what: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a check found."""

    divergence: Divergence | None  # the first one
    error: float = float("inf")  # the largest of any value, relative to its norm
    outputs: tuple[Tensor, ...] = ()  # of the shrunk model


@dataclass(slots=True)
class Footprint:
    """What the shrunk run leaves of one operation."""

    scalars: tuple[Any, ...]
    values: list[tuple[Shape, float, float] | None]
    order: Tensor | None = None  # which elements a sort or a suppression took, in order


class Mismatch(Exception):
    """Raised inside a run to stop it."""

    def __init__(self, divergence: Divergence) -> None:
        super().__init__(divergence.what)
        self.divergence = divergence


def opname(func: Any) -> str:
    """An operation's name without its overload; aliases are one."""
    name: str = func._opname
    return NAMES.get(name, name)


def lifted(func: Any, args: Any) -> float | None:
    """The number that `torch.tensor(number)` makes."""
    if func._opname == "lift_fresh" and args[0].numel() == 1 and args[0].dtype != torch.bool:
        return float(args[0])
    return None


def compared(operations: Sequence[Operation]) -> list[int]:
    """The indices of the operations at which the runs must agree."""
    return [index for index, each in enumerate(operations) if _base(each.name) not in PASSING]


def _base(name: str) -> str:
    return name.split(".")[1]


class _Precise(TorchDispatchMode):
    """A run that stays in float64, and in which random numbers are constants."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.double = any(each.dtype == torch.float64 for each in named_weights(model).values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = self.precise(args, kwargs or {})
        result = func(*args, **kwargs)
        return calm(result) if opname(func) in RANDOM else result

    def precise(self, args: Any, kwargs: Any) -> Any:
        """The arguments with casts to lower precision left out, in a float64 run."""
        if not self.double:
            return args, kwargs
        return tree_map(
            lambda leaf: torch.float64 if isinstance(leaf, torch.dtype) and leaf in LOW else leaf, (args, kwargs)
        )


class _Run(_Precise):
    """A run that follows a trace."""

    def __init__(self, model: nn.Module, coupling: Coupling, removed: Mask) -> None:
        super().__init__(model)
        self.coupling, self.removed = coupling, removed
        self.operations = coupling.trace.operations
        self.expected = compared(self.operations)
        self.at = 0
        self.stack = Stack(model)
        self.outputs: list[Tensor] = []

    @property
    def index(self) -> int:
        """The operation of the trace that comes next."""
        return self.expected[min(self.at, len(self.expected) - 1)]

    def fail(self, what: str) -> Mismatch:
        """A divergence at the current operation."""
        index = self.index
        return Mismatch(Divergence(index, self.operations[index].path, what))

    def next(self, func: Any) -> Operation:
        """The operation that should come now."""
        if self.at >= len(self.expected):
            raise self.fail(f"{opname(func)} comes after the end of the traced run")
        operation = self.operations[self.index]
        wanted = NAMES.get(_base(operation.name), _base(operation.name))
        if wanted != opname(func):
            raise self.fail(f"{opname(func)} runs where the traced run has {wanted}")
        return operation

    def follow(self, model: nn.Module, inputs: Inputs) -> None:
        """Run the whole model; raises Mismatch where it diverges, whatever else the model raises."""
        with elementary(model), preserved_globals(seed=0), self.stack.watching(), self:
            self.outputs = tensors(call(model, inputs))
        if self.at < len(self.expected):
            raise self.fail("the run ends before the traced one")


class Follower(_Run):
    """The shrunk model's run: shapes must be as predicted; with `footprints` it leaves numbers to compare with."""

    def __init__(self, model: nn.Module, coupling: Coupling, removed: Mask, *, values: bool) -> None:
        super().__init__(model, coupling, removed)
        self.values = values
        self.loose = False  # has a size been seen that depends on data?
        self.footprints: list[Footprint] = []
        self.lifted: list[float] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = self.precise(args, kwargs or {})
        if opname(func) in PASSING:
            if (number := lifted(func, args)) is not None:
                self.lifted.append(number)
            return func(*args, **kwargs)
        operation = self.next(func)
        result = func(*args, **kwargs)
        if opname(func) in RANDOM:
            result = calm(result)
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.loose |= opname(func) in COUNTING or torch.Tag.dynamic_output_shape in func.tags
        for value, output in zip(operation.outputs, outputs, strict=False):
            shape = self._shape(value, tuple(output.shape))
            if shape != tuple(output.shape):
                raise self.fail(f"{opname(func)} gives {tuple(output.shape)} instead of {shape}")
        leaves = [leaf for leaf in tree_leaves((args, kwargs)) if not isinstance(leaf, Tensor)]
        digests = [digest(each) if self.values else None for each in outputs]
        order = outputs[-1] if self.values and opname(func) in SORTING else None
        self.footprints.append(Footprint(tuple(leaves), digests, order))
        self.at += 1
        return result

    def _shape(self, value: Value, got: Shape) -> Shape:
        """What is predicted; sizes that may depend on data and lose nothing are taken as they come."""
        shape = self.coupling.shape(value, self.removed)
        if not self.loose or len(got) != len(shape):
            return shape
        return tuple(new if old == size else size for old, size, new in zip(value.shape, shape, got, strict=True))


class Masked(_Run):
    """The original's run with everything removed set to zero; each value must leave what the shrunk run left."""

    def __init__(self, model: nn.Module, coupling: Coupling, removed: Mask, followed: Follower) -> None:
        super().__init__(model, coupling, removed)
        self.footprints = followed.footprints
        self.lifted = iter(followed.lifted)
        self.largest = 0.0
        self.ratios = _ratios(coupling, removed)

    def keep(self, layers: Any, shape: Shape) -> list[Mask | None]:
        """Per dimension what stays."""
        return self.coupling.kept(layers, shape, self.removed)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = self.precise(args, kwargs or {})
        name = opname(func)
        if name in PASSING:
            result = func(*args, **kwargs)
            number = lifted(func, args)
            if number is not None and (other := next(self.lifted, number)) != number:
                result = torch.full_like(result, self.scale(func, number, other))
            return result
        operation = self.next(func)
        footprint = self.footprints[self.at]
        leaves, spec = tree_flatten((args, kwargs))
        touched = any(
            any(each is not None for each in self.keep(value.layers, value.shape)) for value in operation.inputs
        )
        if name in COMPACT and touched:
            result = self._compact(func, leaves, spec, operation, footprint)
        else:
            result = self._plain(func, leaves, spec, footprint)
        if name in RANDOM:
            result = calm(result)
        if footprint.order is not None:
            result = in_order(func, args, kwargs, footprint.order)
        flat, out_spec = tree_flatten(result)
        place = 0
        for position, leaf in enumerate(flat):
            if not isinstance(leaf, Tensor):
                continue
            if place < len(operation.outputs):
                value = operation.outputs[place]
                keep = self.keep(value.layers, value.shape)
                flat[position] = zeroed(leaf, keep)
                self._compare(flat[position], keep, footprint.values[place] if place < len(footprint.values) else None)
            place += 1
        self.at += 1
        return tree_unflatten(flat, out_spec)

    def _plain(self, func: Any, leaves: list[Any], spec: Any, footprint: Footprint) -> Any:
        numbers = iter(footprint.scalars)
        chosen = []
        for leaf in leaves:
            if isinstance(leaf, Tensor):
                chosen.append(leaf)
                continue
            other = next(numbers, leaf)
            scaling = isinstance(leaf, float) or (type(leaf) is int and opname(func).rstrip("_") in SCALING)
            if scaling and isinstance(other, (int, float)) and other != leaf:
                leaf = self.scale(func, leaf, other)
            chosen.append(leaf)
        args, kwargs = tree_unflatten(chosen, spec)
        return func(*args, **kwargs)

    def scale(self, func: Any, mine: float, other: float) -> float:
        """The shrunk run's number, if it is this run's but for the sizes that it is computed from."""
        if not any(abs(other - mine * ratio) <= 1e-6 * abs(other) for ratio in self.ratios):
            raise self.fail(f"{opname(func)} takes {other!r} where the original takes {mine!r}")
        return other

    def _compact(self, func: Any, leaves: list[Any], spec: Any, operation: Operation, footprint: Footprint) -> Any:
        numbers, values = iter(footprint.scalars), iter(operation.inputs)
        chosen = []
        for leaf in leaves:
            if isinstance(leaf, Tensor):
                value = next(values)
                chosen.append(gathered(leaf, self.keep(value.layers, value.shape)))
            else:
                chosen.append(next(numbers, leaf))
        args, kwargs = tree_unflatten(chosen, spec)
        flat, out_spec = tree_flatten(func(*args, **kwargs))
        for position, (leaf, value) in enumerate(zip(flat, operation.outputs, strict=False)):
            flat[position] = spread(leaf, self.keep(value.layers, value.shape), value.shape)
        return tree_unflatten(flat, out_spec)

    def _compare(self, full: Tensor, keep: list[Mask | None], wanted: tuple[Shape, float, float] | None) -> None:
        if wanted is None:
            return
        shape, norm, product = digest(gathered(full, keep))
        if shape != wanted[0]:
            raise self.fail(f"a value of shape {wanted[0]} should be of shape {shape}")
        error = max(abs(norm - wanted[1]), abs(product - wanted[2])) / max(norm, wanted[1], 1e-12)
        if not error <= TOLERANCE:
            raise self.fail(f"a value differs by {error:.1e} of its norm")
        self.largest = max(self.largest, error)


def _ratios(coupling: Coupling, removed: Mask) -> set[float]:
    """The factors that scales computed from changed sizes may change by."""
    pairs = set()
    for operation in coupling.trace.operations:
        for value in (*operation.inputs, *operation.outputs):
            if value.layers:
                pairs |= set(zip(value.shape, coupling.shape(value, removed), strict=True))
    ratios = {new / old for old, new in pairs if new != old and new}
    return {sign for ratio in ratios for power in POWERS for sign in (ratio**power, ratio**-power)}


@torch.no_grad()
def prepare(model: nn.Module, inputs: Inputs, seed: int = 0) -> tuple[nn.Module, Inputs]:
    """Make a copy of a model fit for the check, in place: float64, no two weights alike, random inputs.

    A head that starts at zero or a scale of ones would hide what goes wrong before it.
    """
    generator = torch.Generator().manual_seed(seed)

    def random(like: Tensor) -> Tensor:
        return torch.rand(like.shape, generator=generator, dtype=torch.float64).to(like.device)

    model.double()
    for tensor in named_weights(model).values():
        if tensor.is_floating_point() and tensor.numel() > 1 and bool((tensor == tensor.reshape(-1)[0]).all()):
            level = float(tensor.reshape(-1)[0])
            tensor.copy_((level if np.isfinite(level) else 0.0) + 0.1 + 0.5 * random(tensor))

    def varied(leaf: Any) -> Any:
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            leaf = leaf.double()
            return leaf + (0.1 + leaf.abs().mean()) * (random(leaf) - 0.5)
        return leaf

    flat, spec = tree_flatten(inputs)
    changed: Inputs = tree_unflatten([varied(leaf) for leaf in flat], spec)
    return model, changed


@torch.no_grad()
def mask_weights(model: nn.Module, coupling: Coupling, removed: Mask) -> None:
    """Set the removed elements of every weight to zero, in place."""
    own = named_weights(model)
    for name, value in coupling.trace.weights.items():
        zeroed(own[name].data, coupling.kept(value.layers, value.shape, removed))


def shapes_agree(model: nn.Module, coupling: Coupling, removed: Mask, inputs: Inputs) -> Divergence | None:
    """Does the shrunk model run with the predicted shape of every value? One forward pass, in evaluation mode."""
    run = Follower(model, coupling, removed, values=False)
    with untouched(model):
        return _outcome(run, model, inputs)


def _outcome(run: _Run, model: nn.Module, inputs: Inputs) -> Divergence | None:
    try:
        run.follow(model, inputs)
    except Mismatch as mismatch:
        return mismatch.divergence
    except Exception as error:  # noqa: BLE001 - whatever the user's code raises on wrong shapes is the finding
        return run.fail(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}").divergence
    return None


def verify(original: nn.Module, shrunk: nn.Module, coupling: Coupling, removed: Mask, inputs: Inputs) -> Verdict:
    """Does the shrunk model compute what the masked original computes? Two forward passes.

    Args:
        original: as `prepare` made it; its weights are masked in place.
        shrunk: cut from the same weights.
    """
    follower = Follower(shrunk, coupling, removed, values=True)
    diverged = _outcome(follower, shrunk, inputs)
    if diverged is not None:
        return Verdict(diverged)
    mask_weights(original, coupling, removed)
    masked = Masked(original, coupling, removed, follower)
    diverged = _outcome(masked, original, inputs)
    if diverged is None and [each.shape for each in follower.outputs] != [each.shape for each in masked.outputs]:
        diverged = masked.fail("an output of the model changes its shape").divergence
    if diverged is not None:
        return Verdict(diverged)
    return Verdict(None, masked.largest, tuple(follower.outputs))


def change(original: nn.Module, inputs: Inputs, after: Sequence[Tensor]) -> float:
    """How much outputs differ from the unpruned model's, relative to their norm: at 0 the check has shown nothing.

    Infinite where they cannot be compared. One forward pass of a model that has not run yet, as it may fill caches.
    """
    before = outputs(original, inputs)
    if [each.shape for each in before] != [each.shape for each in after]:
        return float("inf")
    largest = 0.0
    for one, two in zip(before, after, strict=True):
        old, new = (each.double().nan_to_num(0.0, 0.0, 0.0) for each in (one, two))
        largest = max(largest, float((old - new).norm() / old.norm().clamp(min=1e-300)))
    return largest


def outputs(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    """The output tensors of a plain run, as precise as the check."""
    with elementary(model), preserved_globals(seed=0), _Precise(model):
        return tensors(call(model, inputs))
