"""Which layers: one matcher for every method.

A pattern is a glob over module or parameter paths (`layer4.*`, `conv1`, `encoder.*.mlp`), where `*` also crosses
dots and a module stands for all that is inside it, or `type:NAME` with the name of a class (`type:LSTM`).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from torchslim.errors import SelectError

NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.LocalResponseNorm)
EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)

Patterns = str | Sequence[str] | None


def as_list(patterns: Patterns) -> list[str]:
    """One pattern or several, as a list."""
    return [patterns] if isinstance(patterns, str) else list(patterns or ())


def matches(pattern: str, path: str, types: Mapping[str, Sequence[str]]) -> bool:
    """Does a pattern cover the parameter or module at `path`? `types` maps module paths to their class names."""
    parts = path.split(".")
    prefixes = [".".join(parts[:end]) for end in range(len(parts), 0, -1)]
    if pattern.startswith("type:"):
        wanted = pattern.removeprefix("type:")
        return any(wanted in types.get(prefix, ()) for prefix in (*prefixes, ""))
    return any(fnmatchcase(prefix, pattern) for prefix in prefixes)


def class_names(model: nn.Module) -> dict[str, list[str]]:
    """The class names of each module, bases included up to `Module`, by path."""
    return {
        path: [base.__name__ for base in type(module).__mro__ if base not in (nn.Module, object)]
        for path, module in model.named_modules()
    }


def prunable_by_default(owner: nn.Module, name: str, parameter: nn.Parameter) -> bool:
    """Weights of conv, linear, recurrent and attention layers; never biases, norms or embeddings."""
    return (
        parameter.dim() >= 2
        and "weight" in name
        and "bias" not in name
        and parameter.is_floating_point()
        and not isinstance(owner, (*NORMS, *EMBEDDINGS))
        and not hasattr(owner, "parametrizations")
        and "Norm" not in type(owner).__name__  # a user's own norm
        and "Embedding" not in type(owner).__name__
    )


def select_weights(model: nn.Module, include: Patterns = None, exclude: Patterns = None) -> dict[str, nn.Parameter]:
    """Parameters by path, each tensor once: the default ones that are included, and those named in full.

    Raises:
        SelectError: when a pattern matches nothing, with the nearest names.
    """
    types = class_names(model)
    owners = dict(model.named_modules())
    everything = dict(model.named_parameters())
    if not everything:
        raise SelectError(f"the model ({type(model).__name__}) has no parameters; there is nothing to compress")
    default = {
        path: parameter
        for path, parameter in everything.items()
        if prunable_by_default(owners[path.rpartition(".")[0]], path.rpartition(".")[2], parameter)
    }
    wanted, unwanted = as_list(include), as_list(exclude)
    for pattern in unwanted:
        _require(pattern, everything, owners, types)
    chosen = dict(default) if include is None else {}
    for pattern in wanted:
        _require(pattern, everything, owners, types)
        found = {path: each for path, each in default.items() if matches(pattern, path, types)}
        # biases, norms and embeddings only by a pattern that ends in the parameter's own name
        named = {
            path: each
            for path, each in everything.items()
            if not pattern.startswith("type:") and path not in default and fnmatchcase(path, pattern)
            and fnmatchcase(path.rpartition(".")[2], pattern.rpartition(".")[2]) and not pattern.endswith("*")
        }
        if not found and not named:
            inside = [path for path in everything if matches(pattern, path, types)]
            raise SelectError(
                f"pattern {pattern!r} matches no weight that is pruned by default; to prune it all the same, name "
                f"the parameter: {', '.join(inside[:5])}"
            )
        chosen |= found | named
    kept = {path: each for path, each in chosen.items() if not any(matches(p, path, types) for p in unwanted)}
    if not kept:
        raise SelectError("no layer is left to compress: every included layer is excluded, or there is none")
    return {path: everything[path] for path in everything if path in kept}


def by_pattern(patterns: Iterable[str], paths: Iterable[str], model: nn.Module) -> dict[str, str]:
    """For each path the last pattern that covers it; every pattern must cover one."""
    types, paths = class_names(model), list(paths)
    owners = dict(model.named_modules())
    covered: dict[str, str] = {}
    for pattern in patterns:
        found = [path for path in paths if matches(pattern, path, types)]
        if not found:
            raise SelectError(_unmatched(pattern, [*paths, *(path for path in owners if path)]))
        covered.update(dict.fromkeys(found, pattern))
    return covered


def _require(
    pattern: str, parameters: Iterable[str], owners: Mapping[str, nn.Module], types: Mapping[str, Sequence[str]]
) -> None:
    names = [*(path for path in owners if path), *parameters]
    if not any(matches(pattern, path, types) for path in names):
        raise SelectError(_unmatched(pattern, names))


def _unmatched(pattern: str, names: Sequence[str]) -> str:
    near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.4) or list(names)[:5]
    return f"pattern {pattern!r} matches no layer; near names: {', '.join(near)}"
