"""Finds the residual blocks of a recorded run: branches that start at a value and are added to it.

No class is known by name. An addition is residual if one of its terms (the shortcut) is an earlier value, or was made
of one by operations that read nothing else, and the other term (the branch) was computed from that value. The modules
that run for the branch alone can go. A module around two or more branches, whose output has the form of its input, is a
block too: all of it can go at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from torchslim.prune.depth.flow import Flow, Key, Leaf, ModuleCall, Unknown, places
from torchslim.prune.structured.bypass import Given, Place, Returned, Zeros

Way = Mapping[str, Returned]
"""A way to remove a block: what is returned in the place of each removed module, by path."""


@dataclass(frozen=True)
class Residual:
    """A block of the model, and ways to remove it that are still to be verified.

    Its removal is defined by `zeroed` or by `passed`: the terms of additions that become zero, or a module whose output
    (at the first place) becomes its argument (at the second).
    """

    name: str
    ways: tuple[Way, ...]
    zeroed: Mapping[Key, int] = field(default_factory=dict)
    passed: Mapping[str, tuple[Place, Place]] = field(default_factory=dict)
    reason: str = ""  # why it has no way


@dataclass
class _Branch:
    """A branch: its additions in all calls, and what runs for it alone."""

    zeroed: dict[Key, int]
    sites: list[tuple[int, int]]  # steps of the additions, and the value that the branch starts from
    modules: list[str] = field(default_factory=list)  # outermost modules that run for the branch alone
    owner: list[str] = field(default_factory=list)  # paths of the calls around the branch, the outermost first
    nested: bool = False  # whether it runs inside of another branch


def find(flow: Flow, model: nn.Module) -> list[Residual]:
    """The residual blocks in the order of their additions; those that have no way to go give a reason."""
    sizes = {
        path: sum(weight.numel() for weight in module.parameters())
        for path, module in model.named_modules(remove_duplicate=False)
    }
    branches = [branch for branch in _branches(flow) if _explore(flow, branch, sizes)]
    for branch in branches:
        branch.nested = any(other is not branch and _inside(flow, branch, other.modules) for other in branches)
    outer = [branch for branch in branches if not branch.nested]
    blocks: dict[str, Residual] = {}
    wholes = _wholes(flow, model, outer)
    for branch in branches:
        siblings = outer if not branch.nested else [branch]
        alone = branch.owner and sum(branch.owner[-1] in other.owner for other in siblings) == 1
        path = branch.owner[-1] if alone else ""
        name = _free(path or _child(branch, branches, sizes), blocks)
        for whole in [whole for whole in wholes if not branch.nested and whole.name in branch.owner]:
            blocks.setdefault(whole.name, whole)
        ways = [way for way in (_passing(flow, path, branch) if path else None, *_silencing(flow, branch)) if way]
        reason = "" if ways else "its modules return values that no argument gives the form of"
        blocks[name] = Residual(name, tuple(ways), branch.zeroed, reason=reason)
    return list(blocks.values())


def _child(branch: _Branch, branches: Sequence[_Branch], sizes: Mapping[str, int]) -> str:
    """Path of the largest module of a branch, or of the outermost module around it that no other branch runs in."""
    largest = max(branch.modules, key=lambda module: sizes[module])
    others = [module for other in branches if other is not branch for module in (*other.modules, *other.owner)]
    above = branch.owner[-1] if branch.owner else ""
    names = largest.removeprefix(f"{above}." if above else "").split(".")
    for count in range(1, len(names)):
        path = ".".join([above, *names[:count]]).lstrip(".")
        if not any(f"{other}.".startswith(f"{path}.") for other in others):
            return path
    return largest


def _free(name: str, taken: Iterable[str]) -> str:
    """The name, with a number where several blocks would have it."""
    number, free = 2, name
    while free in taken:
        free, number = f"{name}#{number}", number + 1
    return free


def _branches(flow: Flow) -> list[_Branch]:
    """Branches by their addition, whose calls all have the same term as the branch."""
    by_key: dict[Key, _Branch | None] = {}
    for index, step in enumerate(flow.steps):
        if step.key is None:
            continue
        site = _site(flow, index)
        if site is None:
            by_key[step.key] = None
            continue
        term, start = site
        branch = by_key.setdefault(step.key, _Branch({step.key: term}, []))
        if branch is None or branch.zeroed[step.key] != term:
            by_key[step.key] = None
        else:
            branch.sites.append((index, start))
    return [branch for branch in by_key.values() if branch is not None]


def _site(flow: Flow, index: int) -> tuple[int, int] | None:
    """Which term of an addition is the branch, and the value that it starts from; None if none is."""
    step = flow.steps[index]
    for branch in (1, 0) if step.name.startswith("add") else (1,):
        shortcut = step.terms[1 - branch]
        end = step.terms[branch].source
        if shortcut.shape != step.shape or not shortcut.floating or end < 0 or end == shortcut.source:
            continue
        start = next((root for root in flow.roots(shortcut.source) if flow.descends(end, root)), None)
        if start is not None:
            return branch, start
    return None


def _explore(flow: Flow, branch: _Branch, sizes: Mapping[str, int]) -> bool:
    """Note the modules that run for a branch alone; False if no weights go with them."""
    alive = flow.live({})
    cut = {index: flow.steps[index].terms[next(iter(branch.zeroed.values()))].source for index, _ in branch.sites}
    if not all(index in alive for index in cut):
        return False
    kept = flow.live(cut)
    dead = alive - kept
    calls_by_path: dict[str, list[ModuleCall]] = {}
    for call in flow.calls:
        calls_by_path.setdefault(call.path, []).append(call)
    gone = {
        path
        for path, calls in calls_by_path.items()
        if path
        and any(index in dead for call in calls for index in range(call.start, call.end))
        and not any(index in kept for call in calls for index in range(call.start, call.end))
    }
    numbers: list[int] = []
    for number, call in enumerate(flow.calls):
        chain = flow.chain(call.parent)
        if call.path in gone and call.end > call.start and not any(flow.calls[outer].path in gone for outer in chain):
            numbers.append(number)
    branch.modules = list(dict.fromkeys(flow.calls[number].path for number in numbers))
    if not any(sizes[path] for path in branch.modules):
        return False
    first = branch.sites[0][0]
    common = flow.chain(flow.steps[first].call)
    for number in numbers:
        if flow.calls[number].end <= first:
            chain = flow.chain(flow.calls[number].parent)
            common = [own for own, other in zip(common, chain, strict=False) if own == other]
    branch.owner = [path for number in common if (path := flow.calls[number].path)]
    return True


def _inside(flow: Flow, branch: _Branch, modules: Sequence[str]) -> bool:
    """Whether the additions of a branch run in one of the modules."""
    chain = flow.chain(flow.steps[branch.sites[0][0]].call)
    return any(flow.calls[number].path in modules for number in chain)


def _wholes(flow: Flow, model: nn.Module, branches: Sequence[_Branch]) -> list[Residual]:
    """For each branch the innermost module with two branches or more, where all of it can go."""
    found: dict[str, Residual] = {}
    for branch in branches:
        for path in reversed(branch.owner):
            inside = [other for other in branches if path in other.owner]
            if len(inside) > 1:
                # a sequence is no more than its elements
                sequence = isinstance(model.get_submodule(path), nn.Sequential)
                if path not in found and not sequence and (whole := _whole(flow, path, inside)) is not None:
                    found[path] = whole
                break
    return list(found.values())


def _whole(flow: Flow, path: str, branches: Sequence[_Branch]) -> Residual | None:
    """The block of a whole module whose output has the form of its input."""
    ways, stream = [], []
    for call in _calls(flow, path):
        sites = sorted(site for branch in branches for site in branch.sites if call.start <= site[0] < call.end)
        if not sites:
            return None
        entry = _entry(flow, call, flow.roots(sites[0][1]))
        exits = _exits(flow, call, sites[-1][0])
        if entry is None or len(exits) != 1 or value_form(call, exits[0]) != value_form(call, entry, given=True):
            return None
        returned = _passed(call, entry, exits[0])
        if returned is None:
            return None
        ways.append(returned)
        stream.append((exits[0], entry))
    if any(way != ways[0] for way in ways) or any(pair != stream[0] for pair in stream):
        return None
    return Residual(path, ({path: ways[0]},), passed={path: stream[0]})


def _calls(flow: Flow, path: str) -> list[ModuleCall]:
    return [call for call in flow.calls if call.path == path]


def value_form(call: ModuleCall, place: Place, *, given: bool = False) -> tuple[Any, ...]:
    """Shape and type of the tensor at a place of a call's arguments or results."""
    leaf = dict(places(call.given if given else call.returned))[place]
    return leaf.shape, leaf.dtype


def _entry(flow: Flow, call: ModuleCall, roots: Sequence[int]) -> Place | None:
    """Place of the argument that a shortcut comes from."""
    for root in roots:
        for place, leaf in places(call.given):
            if isinstance(leaf, Leaf) and leaf.floating and leaf.source == root:
                return place
    return None


def _exits(flow: Flow, call: ModuleCall, addition: int) -> list[Place]:
    """Places of the results that depend on an addition."""
    return [
        place
        for place, leaf in places(call.returned)
        if isinstance(leaf, Leaf) and leaf.source >= 0 and flow.descends(leaf.source, addition)
    ]


def _passing(flow: Flow, path: str, branch: _Branch) -> Way | None:
    """The way that returns a module's argument in place of the result that a branch is added to."""
    ways = []
    for call in _calls(flow, path):
        sites = [site for site in branch.sites if call.start <= site[0] < call.end]
        if not sites:
            return None
        entry = _entry(
            flow, call, flow.roots(flow.steps[sites[0][0]].terms[1 - next(iter(branch.zeroed.values()))].source)
        )
        exits = _exits(flow, call, sites[0][0])
        if entry is None or len(exits) != 1 or value_form(call, exits[0]) != value_form(call, entry, given=True):
            return None
        ways.append(_passed(call, entry, exits[0]))
    return {path: ways[0]} if ways and ways[0] is not None and all(way == ways[0] for way in ways) else None


def _passed(call: ModuleCall, entry: Place, exit_: Place) -> Returned | None:
    """What a bypass returns: the argument at `entry` in place of the result at `exit_`, the others as they are."""

    def made(place: Place, leaf: Any) -> Returned:
        if place == exit_:
            return Given(entry)
        return _as_given(call, leaf)

    try:
        return _rebuilt(call.returned, made)
    except ValueError:
        return None


def _as_given(call: ModuleCall, leaf: Any) -> Returned:
    """A result that is an argument or a plain value; tensors of the removed module's own become None."""
    if isinstance(leaf, Unknown):
        raise ValueError("a value of a class")
    if not isinstance(leaf, Leaf):
        return leaf
    place = next((place for place, given in places(call.given) if given == leaf), None)
    return None if place is None else Given(place)


def _rebuilt(tree: Any, made: Any, place: Place = ()) -> Returned:
    if isinstance(tree, dict):
        return {key: _rebuilt(item, made, (*place, key)) for key, item in tree.items()}
    if isinstance(tree, (tuple, list)):
        return type(tree)(_rebuilt(item, made, (*place, index)) for index, item in enumerate(tree))
    return made(place, tree)


def _silencing(flow: Flow, branch: _Branch) -> list[Way]:
    """Ways in which all modules of a branch return zeros: of their argument's shape, or of their own."""
    ways: list[Way] = []
    for fixed in (False, True):
        way: dict[str, Returned] = {}
        for path in branch.modules:
            returned = [_silent(call, fixed) for call in _calls(flow, path)]
            if returned[0] is None or any(other != returned[0] for other in returned):
                break
            way[path] = returned[0]
        else:
            if way not in ways:
                ways.append(way)
    return ways


def _silent(call: ModuleCall, fixed: bool) -> Returned | None:
    """Zeros in place of a module's results; None where no argument has the results' type, or a result is a class's."""
    arguments = [(place, leaf) for place, leaf in places(call.given) if isinstance(leaf, Leaf) and leaf.floating]

    def made(place: Place, leaf: Any) -> Returned:
        if not isinstance(leaf, Leaf):
            return _as_given(call, leaf)
        alike = [(place, given) for place, given in arguments if given.shape == leaf.shape] or arguments
        if not alike or not leaf.floating:
            return None
        like, argument = alike[0]
        shape = None
        if fixed and argument.shape != leaf.shape:
            aligned = len(argument.shape) == len(leaf.shape)
            shape = tuple(
                -1 - dim if aligned and size == argument.shape[dim] else size for dim, size in enumerate(leaf.shape)
            )
        return Zeros(like, shape)

    try:
        return _rebuilt(call.returned, made)
    except ValueError:
        return None
