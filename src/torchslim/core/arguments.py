"""Check arguments of public functions against their declared types; the error says what to pass."""

from __future__ import annotations

import functools
import inspect
import itertools
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ParamSpec, TypeVar

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from torchslim.core.checks import Misfit, Seed, Threads, fitting, got, shown, types_of
from torchslim.errors import TorchslimError

P = ParamSpec("P")
R = TypeVar("R")

NAMED: Mapping[str, Any] = {"threads": Threads | None, "seed": Seed}  # types by name, in every function
MOST = 4  # more positional arguments than any public function takes
TREES = ("example_inputs",)  # arguments that hold tensors; none may be empty or without values


def checks_arguments(
    error: type[TorchslimError], *, earlier: Sequence[str] = ()
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorator that checks types of arguments, refuses models with NaN, and refuses empty inputs.

    Values are passed to the function unchanged. A wrong argument raises `error` with its name. If the positional
    arguments fit in another order, the message shows that order. `earlier` is an order of arguments from earlier
    versions: such a call still works, with a warning.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        signature = inspect.signature(function)
        names = [*signature.parameters]

        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            hints = types_of(function)
            bound = signature.bind(*args, **kwargs).arguments  # a missing or unknown argument is a TypeError, as usual
            try:
                for name, value in bound.items():
                    if value is not signature.parameters[name].default:
                        _check(value, NAMED.get(name, hints.get(name, Any)), name, error)
            except error as failure:
                kinds = [hints.get(name, Any) for name in names[: len(args)]]
                order = _fitting_order(args, kinds)
                if order is None:
                    raise
                new = f"{function.__name__}({', '.join(names[: len(args)])}{', ...' if kwargs else ''})"
                if [names[order.index(place)] for place in range(len(args))] != [*earlier]:
                    raise error(f"{failure}; the arguments are in another order: call {new}") from failure
                warnings.warn(
                    f"{function.__name__}({', '.join(earlier)}) is an earlier order of the arguments; call {new}",
                    DeprecationWarning,
                    stacklevel=2,
                )
                return call(*(args[place] for place in order), **kwargs)  # type: ignore[arg-type]
            return function(*args, **kwargs)

        return call

    return decorate


def _fitting_order(values: Sequence[Any], kinds: Sequence[Any]) -> tuple[int, ...] | None:
    """The only other order in which every value fits its kind, as indices of values; None for no or several orders."""

    def fits(value: Any, kind: Any) -> bool:
        try:
            fitting(value, kind)
        except Misfit:
            return False
        return True

    places = tuple(range(len(values)))
    grid = [[fits(value, kind) for value in values] for kind in kinds]
    if len(values) > MOST or all(grid[place][place] for place in places):  # if all fit, the types are not the fault
        return None
    orders = [order for order in itertools.permutations(places) if all(map(list.__getitem__, grid, order))]
    return orders[0] if len(orders) == 1 else None


def _check(value: Any, kind: Any, name: str, error: type[TorchslimError]) -> None:
    if isinstance(value, nn.Module):
        check_weights(value, error, name)
    if name in TREES:
        _check_inputs(value, name, error)
        return
    if kind is nn.Module and type(value).__module__.startswith("torch.") and callable(value):
        return  # a compiled or exported program: the function itself raises a better error
    try:
        fitting(value, kind)
    except Misfit as misfit:
        hint = "; give the trained module" if kind is nn.Module and not isinstance(value, type) else ""
        raise error(f"{name} {misfit}, {got(value)}{hint}") from misfit


def check_weights(model: nn.Module, error: type[TorchslimError], name: str = "model") -> None:
    """Raise `error` if a weight of `model` holds NaN: every result that depends on it would be NaN."""
    for path, weight in model.named_parameters():
        if is_lazy(weight) or weight.is_meta or not weight.is_floating_point() or not weight.numel():
            continue
        if bool(weight.detach().isnan().any()):
            raise error(
                f"{name}: the weight {path!r} holds NaN; give a model whose weights are numbers, such as an earlier "
                "checkpoint"
            )


def _check_inputs(value: Any, name: str, error: type[TorchslimError]) -> None:
    if not isinstance(value, (tuple, list, Mapping)):
        hint = "(x,)" if isinstance(value, Tensor) else "a tuple of positional or a dict of keyword arguments"
        raise error(f"{name} must be a tuple or a dict of the model's arguments, {got(value)}; give {hint}")
    for place, leaf in _leaves(value):
        if isinstance(leaf, Tensor) and leaf.is_meta:
            raise error(f"{name}{place} is on the meta device and has no values; give a tensor with values")
        if isinstance(leaf, Tensor) and leaf.dim() and not leaf.numel():
            raise error(f"{name}{place} is empty, got {shown(leaf)}; give at least one sample")


def _leaves(value: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, entry in value.items():
            yield from _leaves(entry, f"{place}[{shown(key)}]")
    elif isinstance(value, (tuple, list)):
        for index, entry in enumerate(value):
            yield from _leaves(entry, f"{place}[{index}]")
    else:
        yield place, value
