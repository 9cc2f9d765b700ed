"""Nothing of the caller's changes: copies of models, and global state that is left as it was found."""

from __future__ import annotations

import copy
import ctypes
import functools
import importlib
import io
import logging
import random
import sys
import threading
import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, redirect_stderr, redirect_stdout
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import transformer
from torch.nn.utils import prune
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from torchslim.errors import ModelError


def duplicate(model: nn.Module, weights: Mapping[int, Tensor] | None = None) -> nn.Module:
    """A deep copy of `model` as it stands: the one way in which models are copied.

    Computed tensors among its attributes, which deepcopy refuses, are detached; those that an old-style weight norm or
    spectral norm keeps are computed anew. Tensors in `weights`, by the identity of the originals, take their places.

    Raises:
        ModelError: an attribute cannot be copied; the message names it.
    """
    # deepcopy takes what the memo holds: non-leaf attributes (of lists and dicts too) are replaced by detached clones
    memo: dict[int, Any] = empty_hooks(model) | {id(each): each.detach().clone() for each in _computed(model)}
    memo |= weights or {}
    try:
        copied = copy.deepcopy(model, memo)
    except Exception as error:
        raise ModelError(_uncopyable(model, error)) from error
    for old, new in zip(model.modules(), copied.modules(), strict=True):
        for name, value in vars(old).items():
            if name.startswith("_torchslim_"):  # a torch.fx.GraphModule forgets attributes that it did not make
                vars(new).setdefault(name, copy.deepcopy(value))
    if weights:
        for module in copied.modules():
            for hook in module._forward_pre_hooks.values():
                if isinstance(hook, (WeightNorm, SpectralNorm)):
                    with torch.no_grad():
                        _renewed(module, hook)
    return copied


def _renewed(module: nn.Module, hook: Any) -> None:
    """Compute the weight that an old-style norm keeps as an attribute, without a step of its power iteration."""
    training, module.training = module.training, False
    try:
        hook(module, None)
    finally:
        module.training = training


def _uncopyable(model: nn.Module, error: Exception) -> str:
    """Which attribute deepcopy refuses."""
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if name in ("_parameters", "_buffers", "_modules"):
                continue
            memo: dict[int, Any] = {id(each): each for each in model.modules()}
            memo |= {id(each): each.detach() for each in _computed(model)}
            try:
                copy.deepcopy(value, memo)
            except Exception as cause:  # noqa: BLE001 - whatever a user's class raises; it is what the message is about
                where = f"{path}.{name}" if path else name
                return (
                    f"{type(model).__name__} cannot be copied: its attribute {where!r}, a {type(value).__name__}, "
                    f"cannot ({type(cause).__name__}: {cause}); keep the attribute outside of the model, or give its "
                    "class a __deepcopy__"
                )
    return f"{type(model).__name__} cannot be copied ({type(error).__name__}: {error}); make copy.deepcopy(model) work"


def copy_model(model: nn.Module) -> tuple[nn.Module, dict[str, Tensor]]:
    """A deep copy of `model`, and the masks it was pruned with.

    Modules that `torch.nn.utils.prune` has touched keep a computed, non-leaf `weight` that deepcopy refuses:
    the copy gets plain parameters instead, with zeros where the mask was zero, and the masks are returned by
    parameter name (boolean, True where kept). A parameter that an unpruned layer shares is given a copy of its own.
    """
    copied = duplicate(model)
    owners = Counter(id(parameter) for module in copied.modules() for parameter in module._parameters.values())
    masks: dict[str, Tensor] = {}
    for path, module in copied.named_modules():
        for hook in list(module._forward_pre_hooks.values()):
            if isinstance(hook, prune.BasePruningMethod):
                name = hook._tensor_name
                mask = getattr(module, f"{name}_mask").bool()
                original = module._parameters[f"{name}_orig"]
                assert original is not None
                if owners[id(original)] > 1:  # else the zeros would reach the other layer
                    owners[id(original)] -= 1
                    module._parameters[f"{name}_orig"] = copy.deepcopy(original)
                prune.remove(module, name)
                masks[f"{path}.{name}" if path else name] = mask
    return copied, masks


def is_plain(model: nn.Module) -> bool:
    """Has no module been pruned by `torch.nn.utils.prune`, and does none hold a computed tensor? Deepcopy takes it."""
    hooks = (hook for module in model.modules() for hook in module._forward_pre_hooks.values())
    return not any(isinstance(each, prune.BasePruningMethod) for each in hooks) and next(_computed(model), None) is None


def _computed(model: nn.Module) -> Iterator[Tensor]:
    for module in model.modules():
        for held in vars(module).values():
            if isinstance(held, (bool, int, float, str)) or (isinstance(held, (dict, list, tuple)) and not held):
                continue
            for value in torch.utils._pytree.tree_leaves(held):
                if isinstance(value, Tensor) and value.grad_fn is not None:
                    yield value


def empty_hooks(model: nn.Module) -> dict[int, Any]:
    """A memo for deepcopy, which spends most of its time on the empty tables of hooks that every module has."""
    return {
        id(value): OrderedDict()
        for module in model.modules()
        for value in vars(module).values()
        if type(value) is OrderedDict and not value
    }


def trim() -> None:
    """Give freed memory back to the system, where the C library holds on to it: large models come and go here."""
    if sys.platform == "linux" and (give_back := getattr(ctypes.CDLL(None), "malloc_trim", None)):
        give_back(0)


@contextmanager
def preserved_globals(seed: int | None = None) -> Iterator[None]:
    """Leave the random state of torch, numpy and Python, and torch's global settings, as they were.

    With a seed, all three generators are seeded inside.
    """
    numpy_random = _numpy_random()
    threads, grad = torch.get_num_threads(), torch.is_grad_enabled()
    dtype, engine = torch.get_default_dtype(), torch.backends.quantized.engine
    deterministic, warn_only = _determinism()
    python_state = random.getstate()
    numpy_state = numpy_random.get_state() if numpy_random else None
    with torch.random.fork_rng(devices=range(_cuda_devices())):
        try:
            if seed is not None:
                seed_everything(seed)
            yield
        finally:
            random.setstate(python_state)
            if numpy_random:
                numpy_random.set_state(numpy_state)
            if torch.get_num_threads() != threads:
                torch.set_num_threads(threads)
            torch.set_grad_enabled(grad)
            torch.set_default_dtype(dtype)
            if torch.backends.quantized.engine != engine:
                torch.backends.quantized.engine = engine
            if (deterministic, warn_only) != _determinism():  # setting it imports all of torch._inductor
                torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)


def _determinism() -> tuple[bool, bool]:
    return torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()


@functools.cache
def _cuda_devices() -> int:
    """How many there are; without a driver, torch looks for one at every call."""
    return torch.cuda.device_count()


def seed_everything(seed: int) -> None:
    """Seed Python's, numpy's and torch's global generators (call inside `preserved_globals`)."""
    random.seed(seed)
    if numpy_random := _numpy_random():
        numpy_random.seed(seed % 2**32)
    torch.manual_seed(seed)


def _numpy_random() -> Any:
    # looked up, not imported: this module needs torch alone, and a user's loader may still use numpy's state
    try:
        return importlib.import_module("numpy.random")
    except ImportError:
        return None


class Shared:
    """A context of process-wide settings that several uses share: the first to enter sets, the last to leave sets back.

    Uses may end in any order and in any thread. Calling it gives a use, for `with`.
    """

    def __init__(self, make: Callable[[], AbstractContextManager[None]]) -> None:
        functools.update_wrapper(self, make)
        self.make = make
        self.lock, self.inside, self.entered = threading.Lock(), 0, ExitStack()

    @contextmanager
    def __call__(self) -> Iterator[None]:
        with self.lock:
            if not self.inside:
                self.entered.enter_context(self.make())
            self.inside += 1
        try:
            yield
        finally:
            with self.lock:
                self.inside -= 1
                if not self.inside:
                    self.entered.close()


@Shared
@contextmanager
def quiet() -> Iterator[None]:
    """Hide what torch, torchao and the exporters print, log and warn of inside: nobody can act on it.

    Errors are raised as ever; only use it around calls of libraries. Output is a process's: what other threads print
    meanwhile is hidden, too.
    """
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


@Shared
@contextmanager
def unfused_attention() -> Iterator[None]:
    """Inside, `nn.TransformerEncoder` and `nn.MultiheadAttention` call their submodules, and take any mask as data.

    In eval mode PyTorch computes both in one kernel, which no runtime, hook or quantizer sees into. Other threads
    compute the same meanwhile, without that kernel.
    """
    fast_path, detect = torch.backends.mha.get_fastpath_enabled(), transformer._detect_is_causal_mask

    def causal(mask: Tensor | None, is_causal: bool | None = None, size: int | None = None) -> bool:
        """Whether a mask may be left out for a causal kernel: while capturing only where the caller says so.

        PyTorch compares the mask's numbers, which a capture does not have. A mask that is kept is right whatever it
        holds, in the capture and for masks that are given later.
        """
        if torch.compiler.is_compiling():
            return is_causal is True
        return detect(mask, is_causal, size)

    torch.backends.mha.set_fastpath_enabled(False)
    transformer._detect_is_causal_mask = causal
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        transformer._detect_is_causal_mask = detect


@contextmanager
def torch_threads(count: int | None) -> Iterator[None]:
    """Run with this many intra-op threads, then set them back; None changes nothing."""
    before = torch.get_num_threads()
    if count is None or count == before:
        yield
        return
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def warn(message: str) -> None:
    """Warn in the name of the first caller outside of this package."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and str(frame.f_globals.get("__name__", "")).partition(".")[0] == "torchslim":
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode and no gradients inside; every module's mode is as before afterwards."""
    modes = [module for module in model.modules() if module.training]
    for module in modes:
        module.training = False
    try:
        with torch.no_grad():
            yield
    finally:
        for module in modes:
            module.training = True


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """`evaluating`, and afterwards the buffers and the random state are as before: a forward pass may change both."""
    before = [
        (module, name, buffer, buffer._version, buffer.clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and not buffer.is_inference()
    ]
    with preserved_globals(), evaluating(model):
        try:
            yield
        finally:
            for module, name, buffer, version, value in before:
                module._buffers[name] = buffer
                if buffer._version != version:
                    buffer.copy_(value)
