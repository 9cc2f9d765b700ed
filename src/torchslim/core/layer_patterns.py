"""Select layers by patterns, with one matcher for every method.

A pattern is a glob over module or parameter paths (`layer4.*`, `conv1`, `encoder.*.mlp`), where `*` also matches
dots and a module includes everything inside it, or `type:NAME` with the name of a class (`type:LSTM`).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

from torchslim.errors import SelectError

NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.LocalResponseNorm)
EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)

Patterns = str | Sequence[str] | None


def as_list(patterns: Patterns) -> list[str]:
    """One pattern, several or None, as a list."""
    return [patterns] if isinstance(patterns, str) else list(patterns or ())


def matches(pattern: str, path: str, types: Mapping[str, Sequence[str]]) -> bool:
    """Whether a pattern covers the parameter or module at `path`; `types` maps module paths to their class names."""
    parts = path.split(".")
    prefixes = [".".join(parts[:end]) for end in range(len(parts), 0, -1)]
    if pattern.startswith("type:"):
        class_name = pattern.removeprefix("type:")
        return any(class_name in types.get(prefix, ()) for prefix in (*prefixes, ""))
    return any(fnmatchcase(prefix, pattern) for prefix in prefixes)


def class_names(model: nn.Module) -> dict[str, list[str]]:
    """Class names of each module and its bases, without `Module` and `object`, by path."""
    return {
        path: [base.__name__ for base in type(module).__mro__ if base not in (nn.Module, object)]
        for path, module in model.named_modules(remove_duplicate=False)
    }


def parameter_paths(model: nn.Module) -> dict[str, list[str]]:
    """All paths of each parameter (a shared one has several), by its path in `named_parameters`."""
    by_tensor: dict[int, list[str]] = {}
    for path, parameter in model.named_parameters(remove_duplicate=False):
        by_tensor.setdefault(id(parameter), []).append(path)
    return {paths[0]: paths for paths in by_tensor.values()}


def prunable_by_default(owner: nn.Module, name: str, parameter: nn.Parameter) -> bool:
    """Whether a parameter is a weight of a conv, linear, recurrent or attention layer: no bias, norm or embedding."""
    return (
        parameter.dim() >= 2
        and parameter.numel() > 0
        and "weight" in name
        and parameter.is_floating_point()
        and not isinstance(owner, (*NORMS, *EMBEDDINGS))
        and not (name.endswith("_g") and hasattr(owner, f"{name[:-2]}_v"))  # magnitudes of `weight_norm`
        and "Norm" not in type(owner).__name__  # a user's own norm
        and "Embedding" not in type(owner).__name__
    )


def check_patterns(model: nn.Module, include: Patterns, exclude: Patterns) -> None:
    """Raise SelectError for a pattern that matches no layer or parameter, with the nearest names."""
    types = class_names(model)
    names = [*types, *(path for paths in parameter_paths(model).values() for path in paths)]
    for pattern in (*as_list(include), *as_list(exclude)):
        if not any(matches(pattern, path, types) for path in names):
            raise SelectError(_unmatched(pattern, names, types))


def select_weights(model: nn.Module, include: Patterns = None, exclude: Patterns = None) -> dict[str, nn.Parameter]:
    """Selected parameters by path, each tensor once: included default weights, and parameters named in full.

    A tensor that two layers share matches by any of its paths, and is a default weight only if both layers allow it.

    Raises:
        SelectError: a pattern matches nothing (with the nearest names), or nothing can be selected.
    """
    types = class_names(model)
    owners = dict(model.named_modules(remove_duplicate=False))
    everything = dict(model.named_parameters())
    paths = parameter_paths(model)
    if not everything:
        raise SelectError(f"the model ({type(model).__name__}) has no parameters; there is nothing to compress")
    shapeless = [path for path, parameter in everything.items() if is_lazy(parameter)]
    if shapeless:
        raise SelectError(f"{shapeless[0]!r} has no shape yet; run one batch through the model first")
    default = {
        path: parameter
        for path, parameter in everything.items()
        if all(
            prunable_by_default(owners[alias.rpartition(".")[0]], alias.rpartition(".")[2], parameter)
            for alias in paths[path]
        )
    }

    def covered(pattern: str, path: str) -> bool:
        return any(matches(pattern, alias, types) for alias in paths[path])

    check_patterns(model, include, exclude)
    included, excluded = as_list(include), as_list(exclude)
    chosen = set(default) if include is None else set()
    for pattern in included:
        # biases, norms and embeddings need a pattern that ends in the parameter's own name
        named = {path for path in everything if any(_names(pattern, alias) for alias in paths[path])}
        matching = {path for path in default if covered(pattern, path)} | named
        if not matching:
            inside = [path for path in everything if covered(pattern, path)]
            hint = f"to prune it anyway, name the parameter: {', '.join(inside[:5])}"
            raise SelectError(
                f"pattern {pattern!r} matches no weight that is pruned by default; "
                f"{hint if inside else 'the layers that it matches have no parameters'}"
            )
        chosen |= matching
    chosen = {path for path in chosen if not any(covered(pattern, path) for pattern in excluded)}
    if not chosen:
        raise SelectError("no layer is left to compress: every included layer is excluded, or there is none")
    return {path: parameter for path, parameter in everything.items() if path in chosen}


def computed_weights(model: nn.Module, include: Patterns = None, exclude: Patterns = None) -> list[str]:
    """Paths of selected weights that a parametrization computes; they have no parameter that could keep zeros."""
    types = class_names(model)
    paths = [
        f"{path}.{name}".lstrip(".")
        for path, module in model.named_modules()
        if is_parametrized(module) and not isinstance(module, (*NORMS, *EMBEDDINGS))
        for name in module.parametrizations
    ]
    return [
        path
        for path in paths
        if (include is None or any(matches(pattern, path, types) for pattern in as_list(include)))
        and not any(matches(pattern, path, types) for pattern in as_list(exclude))
    ]


def by_pattern(patterns: Iterable[str], chosen: Iterable[str], model: nn.Module) -> dict[str, str]:
    """Last pattern that covers each chosen parameter, by parameter.

    Raises:
        SelectError: a pattern covers no chosen parameter.
    """
    types, paths, chosen = class_names(model), parameter_paths(model), list(chosen)
    names = [*types, *(alias for aliases in paths.values() for alias in aliases)]
    covered: dict[str, str] = {}
    for pattern in patterns:
        matching = [path for path in chosen if any(matches(pattern, alias, types) for alias in paths[path])]
        if not matching and any(matches(pattern, path, types) for path in names):
            raise SelectError(
                f"pattern {pattern!r} matches no weight that is chosen for pruning; chosen: {', '.join(chosen[:5])}; "
                "choose others with include=..."
            )
        if not matching:
            raise SelectError(_unmatched(pattern, [*chosen, *names], types))
        covered.update(dict.fromkeys(matching, pattern))
    return covered


def covering(patterns: Iterable[str], model: nn.Module) -> dict[str, str]:
    """Last pattern that covers each parameter of `model`, biases and norms included, by parameter.

    Raises:
        SelectError: a pattern matches no layer or parameter, with the nearest names.
    """
    patterns, types = list(patterns), class_names(model)
    check_patterns(model, patterns, None)
    return {
        path: pattern
        for pattern in patterns  # a later pattern replaces an earlier one
        for path, aliases in parameter_paths(model).items()
        if any(matches(pattern, alias, types) for alias in aliases)
    }


def _names(pattern: str, path: str) -> bool:
    """Whether the pattern spells out the parameter's own name, as `*.bias` does and `*` does not."""
    if pattern.startswith("type:") or pattern.endswith("*"):
        return False
    return fnmatchcase(path, pattern) and fnmatchcase(path.rpartition(".")[2], pattern.rpartition(".")[2])


def _unmatched(pattern: str, names: Iterable[str], types: Mapping[str, Sequence[str]]) -> str:
    if pattern.startswith("type:"):
        names = (f"type:{name}" for kind in types.values() for name in kind)
    by_lower = {name.lower(): name for name in names if name}
    near = difflib.get_close_matches(pattern.lower(), by_lower, n=3, cutoff=0.4) or list(by_lower)[:5]
    return f"pattern {pattern!r} matches no layer; near names: {', '.join(by_lower[name] for name in near)}"
