"""FSDP: spreads a model's weights, gradients and optimizer state over the processes, and gathers them again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from torchslim.core.distributed import is_spread, local, spread, summed, whole
from torchslim.errors import TrainError

CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)
LARGE = 4  # a block with more than 1/LARGE of all weights is split if it contains blocks itself


@dataclass
class _Trace:
    """Changes that `fully_shard` made to a module: its class, attributes and hooks."""

    module: nn.Module
    before: type
    after: type
    attributes: dict[str, Any]
    hooks: dict[str, dict[int, Any]]  # added hooks by table
    order: dict[str, list[int]]  # keys of all hooks by table, earlier ones included


class Shards:
    """A module whose parameters are spread until `close`: each process holds its own rows of them.

    The weights of a block are gathered while it computes, one block after another. Parameters without a dimension, or
    not of a floating-point type, stay whole in every process.
    """

    def __init__(self, model: nn.Module, mesh: Any, device: torch.device) -> None:
        from torch.distributed.fsdp import fully_shard

        self.kept = [parameter for parameter in model.parameters() if not _can_be_spread(parameter)]
        for kept_parameter in self.kept:
            kept_parameter.data = kept_parameter.data.to(device)
        places = [
            (module, name, parameter)
            for module in model.modules()
            for name, parameter in module._parameters.items()
            if parameter is not None and _can_be_spread(parameter)
        ]
        self.strides = {parameter: parameter.stride() for _, _, parameter in places}
        for parameter in self.strides:
            parameter.data = parameter.data.contiguous()
        snapshots = [(module, type(module), set(vars(module)), _tables(module)) for module in model.modules()]
        for module in [*blocks(model), model]:
            module.register_forward_hook(_without_views, prepend=True)
            fully_shard(module, mesh=mesh, reshard_after_forward=True, ignored_params=set(self.kept))
        self.traces = [_trace(*snapshot) for snapshot in snapshots]
        # the original parameters stay, without their values: other references to them see the trained values at the end
        self.places = [(module, name, module._parameters[name], parameter) for module, name, parameter in places]
        self.together = False
        self._empty()

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Make the model an ordinary one with all its weights in each process inside the block; changes are kept."""
        if self.together:
            yield
            return
        self._gather(None)
        self._detach()
        yield
        self._attach()
        with torch.no_grad():
            for _, _, piece, parameter in self.places:
                local(piece).copy_(local(spread(parameter.detach(), piece)))
        self._empty()

    def close(self, home: torch.device | None) -> None:
        """Make the model an ordinary one with its weights at `home`; with None, after an error, the weights are lost.

        All processes must gather weights together, and after an error in one, the others may not take part.
        """
        from torch.distributed import _composable_state

        if home is not None:
            self._gather(home)
        self._detach()
        for trace in self.traces:  # otherwise the module could not be spread again
            _composable_state._module_state_mapping.pop(trace.module, None)

    @torch.no_grad()
    def _gather(self, home: torch.device | None) -> None:
        gathered: set[Tensor] = set()
        for _, _, piece, parameter in self.places:
            if parameter not in gathered:
                full = whole(piece)
                target = torch.empty_strided(
                    full.shape, self.strides[parameter], dtype=full.dtype, device=home or full.device
                )
                parameter.data = target.copy_(full)
                gathered.add(parameter)

    def _empty(self) -> None:
        for parameter in self.strides:
            parameter.data = parameter.new_empty(0)

    def _detach(self) -> None:
        self.together = True
        for trace in self.traces:
            trace.module.__class__ = trace.before
            for name in trace.attributes:
                vars(trace.module).pop(name, None)
            for table, added in trace.hooks.items():
                for key in added:
                    vars(trace.module)[table].pop(key, None)
        for module, name, _, parameter in self.places:
            setattr(module, name, parameter)  # setattr also updates the list of parameters that recurrent layers keep

    def _attach(self) -> None:
        self.together = False
        for module, name, piece, _ in self.places:
            setattr(module, name, piece)
        for trace in self.traces:
            trace.module.__class__ = trace.after
            vars(trace.module).update(trace.attributes)
            for table, added in trace.hooks.items():
                hooks = vars(trace.module)[table]
                merged = {**hooks, **added}
                ordered = [key for key in trace.order[table] if key in merged]
                hooks.clear()  # in place: hook handles refer to the table
                hooks.update({key: merged[key] for key in dict.fromkeys([*ordered, *merged])})


def _without_views(module: nn.Module, args: Any, output: Any) -> Any:
    """Copy outputs that are views: a view that is modified in place would lose the hook that gathers weights."""

    def plain(value: Any) -> Any:
        return value.clone() if isinstance(value, Tensor) and value.requires_grad and value._is_view() else value

    return torch.utils._pytree.tree_map(plain, output)


def _trace(module: nn.Module, before: type, names: set[str], tables: dict[str, list[int]]) -> _Trace:
    now = _tables(module)
    attributes = {name: vars(module)[name] for name in vars(module).keys() - names}
    hooks = {
        name: {key: vars(module)[name][key] for key in keys if key not in tables[name]} for name, keys in now.items()
    }
    return _Trace(module, before, type(module), attributes, hooks, now)


def _tables(module: nn.Module) -> dict[str, list[int]]:
    return {name: list(table) for name, table in vars(module).items() if "_hooks" in name and isinstance(table, dict)}


def _can_be_spread(parameter: Tensor) -> bool:
    return parameter.dim() > 0 and parameter.is_floating_point()


def blocks(model: nn.Module) -> list[nn.Module]:
    """Return the modules whose weights are gathered separately: those in lists and sequences, a model's repeated parts.

    A block that shares weights with other modules is not separate.
    """
    owners: dict[int, set[int]] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            owners.setdefault(id(parameter), set()).add(id(module))
    large = sum(parameter.numel() for parameter in model.parameters()) // LARGE
    block_by_id: dict[int, nn.Module] = {}

    def visit(module: nn.Module) -> None:
        inside = type(module) in CONTAINERS
        for child in module.children():
            if inside and type(child) not in CONTAINERS and _callable(child) and _alone(child, owners):
                has_container = any(type(module) in CONTAINERS for module in child.modules())
                if not has_container or sum(parameter.numel() for parameter in child.parameters()) <= large:
                    block_by_id[id(child)] = child
                    continue
            visit(child)

    visit(model)
    return list(block_by_id.values())


def _callable(module: nn.Module) -> bool:
    return type(module).forward is not nn.Module.forward


def _alone(module: nn.Module, owners: dict[int, set[int]]) -> bool:
    own = {id(child) for child in module.modules()}
    mine = [parameter for parameter in module.parameters() if _can_be_spread(parameter)]
    return bool(mine) and all(owners[id(parameter)] <= own for parameter in mine)


def check_shardable(model: nn.Module, precision: str) -> None:
    """Raise TrainError for a model that cannot be spread: weights of several formats, compiled code, a scaled loss."""
    formats = sorted({str(parameter.dtype) for parameter in model.parameters() if parameter.requires_grad})
    compiled = [path for path, module in model.named_modules() if hasattr(module, "_orig_mod")]
    for wrong, what, mend in (
        (
            len(formats) > 1,
            f"its trainable weights have {len(formats)} formats ({', '.join(formats)})",
            "convert the model to one of them",
        ),
        (bool(compiled), "torch.compile has compiled it, or a module in it", "give the model uncompiled"),
        (
            "16-mixed" in precision and "bf16" not in precision,
            f"precision={precision!r} scales the loss",
            'use precision="bf16-mixed" or "32-true"',
        ),
    ):
        if wrong:
            raise TrainError(f'strategy="fsdp" cannot spread this model: {what}; {mend}, or use strategy="ddp"')


@contextmanager
def explained() -> Iterator[None]:
    """Explain errors of models whose code does not work with weights that are gathered and freed."""
    try:
        yield
    except RuntimeError as error:
        if "DTensor" in str(error) or "RegisterPostBackward" in str(error):
            raise TrainError(
                'strategy="fsdp" cannot train this model: it uses weights of a block without calling the block, or '
                f'writes over a block\'s input in place ({error}); use strategy="ddp"'
            ) from error
        raise


@torch.no_grad()
def clip(parameters: list[Tensor], max_norm: float) -> Tensor:
    """Scale the gradients to a joint norm of at most `max_norm`; return the norm before: ().

    Gradients that are not spread are the same in all processes and count once.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    squares: dict[bool, Any] = {True: torch.zeros((), dtype=torch.float64, device=gradients[0].device), False: 0.0}
    for gradient in gradients:
        own = local(gradient)
        squares[is_spread(gradient)] += own.to(torch.promote_types(own.dtype, torch.float32)).square().sum()
    norm: Tensor = (summed(squares[True]) + squares[False]).sqrt()
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for gradient in gradients:
        local(gradient).mul_(factor)
    return norm


def collected(state: Any, keep: bool) -> Any:
    """Replace the spread tensors of a state by whole ones on the CPU, or by None without `keep`.

    All processes must call this function; those without `keep` never hold more than one whole tensor.
    """

    def collect(value: Any) -> Any:
        if not is_spread(value):
            return value
        full = whole(value.detach())
        return full.cpu() if keep else None

    return torch.utils._pytree.tree_map(collect, state)


def load_spread(model: nn.Module, saved: Mapping[str, Any]) -> None:
    """Load whole tensors into a module, whether it is spread or not."""
    likes = model.state_dict()
    model.load_state_dict({name: spread(value, likes.get(name)) for name, value in saved.items()})


def load_optimizer(optimizer: Optimizer, saved: Mapping[str, Any]) -> None:
    """Load whole tensors into an optimizer, whether its parameters are spread or not."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    numbers = [number for group in saved["param_groups"] for number in group["params"]]
    owners = dict(zip(numbers, parameters, strict=True))
    state = {
        number: {name: spread(value, owners[number]) for name, value in values.items()}
        for number, values in saved["state"].items()
    }
    optimizer.load_state_dict({**saved, "state": state})
