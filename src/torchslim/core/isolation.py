"""Protect the caller's state: copy models, and restore global state."""

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
from torch.utils import checkpoint as torch_checkpoint

from torchslim.core.train_modes import eval_mode
from torchslim.errors import ModelError


def duplicate(model: nn.Module, weights: Mapping[int, Tensor] | None = None) -> nn.Module:
    """Deep copy of `model` in its present state. All code copies models with it.

    Computed tensors among the attributes, which deepcopy refuses, are detached. Tensors in `weights` replace the
    originals with these ids; weights that an old-style weight norm or spectral norm computes are then computed again.

    Raises:
        ModelError: an attribute cannot be copied; the message names the attribute.
    """
    # deepcopy uses the memo's values: it replaces non-leaf attributes (in lists and dicts too) by detached clones
    memo: dict[int, Any] = empty_hooks(model) | {id(tensor): tensor.detach().clone() for tensor in _computed(model)}
    memo |= weights or {}
    try:
        copied = copy.deepcopy(model, memo)
    except Exception as error:
        raise ModelError(_uncopyable(model, error)) from error
    for old, new in zip(model.modules(), copied.modules(), strict=True):
        for name, value in vars(old).items():
            if name.startswith("_torchslim_"):  # copying a torch.fx.GraphModule loses attributes added from outside
                vars(new).setdefault(name, copy.deepcopy(value))
    if weights:
        for module in copied.modules():
            for hook in module._forward_pre_hooks.values():
                if isinstance(hook, (WeightNorm, SpectralNorm)):
                    with torch.no_grad():
                        _renewed(module, hook)
    return copied


def _renewed(module: nn.Module, hook: Any) -> None:
    """Compute the weight that an old-style norm stores as an attribute, without a step of power iteration."""
    training, module.training = module.training, False
    try:
        hook(module, None)
    finally:
        module.training = training


def _uncopyable(model: nn.Module, error: Exception) -> str:
    """Error message that names the attribute which deepcopy refuses."""
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if name in ("_parameters", "_buffers", "_modules"):
                continue
            memo: dict[int, Any] = {id(submodule): submodule for submodule in model.modules()}
            memo |= {id(tensor): tensor.detach() for tensor in _computed(model)}
            try:
                copy.deepcopy(value, memo)
            except Exception as cause:  # noqa: BLE001 - a user's class may raise anything; the message quotes it
                where = f"{path}.{name}" if path else name
                return (
                    f"{type(model).__name__} cannot be copied: its attribute {where!r}, a {type(value).__name__}, "
                    f"cannot ({type(cause).__name__}: {cause}); keep the attribute outside of the model, or give its "
                    "class a __deepcopy__"
                )
    return f"{type(model).__name__} cannot be copied ({type(error).__name__}: {error}); make copy.deepcopy(model) work"


def copy_model(model: nn.Module) -> tuple[nn.Module, dict[str, Tensor]]:
    """Deep copy of `model`, and the masks of `torch.nn.utils.prune` in it.

    Modules that `torch.nn.utils.prune` has changed hold a computed, non-leaf `weight` that deepcopy refuses. The copy
    has plain parameters instead, with zeros where the mask is zero. The masks are returned by parameter name (boolean,
    True where kept). If an unpruned layer shares the parameter, the pruned layer gets a copy of its own.
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
    """Whether deepcopy accepts `model`: it has no mask of `torch.nn.utils.prune` and no computed tensor."""
    hooks = (hook for module in model.modules() for hook in module._forward_pre_hooks.values())
    return not any(isinstance(hook, prune.BasePruningMethod) for hook in hooks) and next(_computed(model), None) is None


def _computed(model: nn.Module) -> Iterator[Tensor]:
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, (bool, int, float, str)) or (isinstance(value, (dict, list, tuple)) and not value):
                continue
            for leaf in torch.utils._pytree.tree_leaves(value):
                if isinstance(leaf, Tensor) and leaf.grad_fn is not None:
                    yield leaf


def empty_hooks(model: nn.Module) -> dict[int, Any]:
    """Memo with the empty hook tables of all modules, on which deepcopy would spend most of its time."""
    return {
        id(value): OrderedDict()
        for module in model.modules()
        for value in vars(module).values()
        if type(value) is OrderedDict and not value
    }


def trim() -> None:
    """Return freed memory to the system: the C library may keep the memory of large models that were deleted."""
    if sys.platform == "linux" and (give_back := getattr(ctypes.CDLL(None), "malloc_trim", None)):
        give_back(0)


@contextmanager
def preserved_globals(seed: int | None = None) -> Iterator[None]:
    """Restore the random state of torch, numpy and Python, and torch's global settings, after the block.

    With a seed, all three generators are seeded before the block.
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
            if (deterministic, warn_only) != _determinism():  # setting determinism imports all of torch._inductor
                torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)


def _determinism() -> tuple[bool, bool]:
    return torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()


@functools.cache
def _cuda_devices() -> int:
    """Number of CUDA devices, cached: without a driver, torch looks for one at every call."""
    return torch.cuda.device_count()


def seed_everything(seed: int) -> None:
    """Seed Python's, numpy's and torch's global generators (call inside `preserved_globals`)."""
    random.seed(seed)
    if numpy_random := _numpy_random():
        numpy_random.seed(seed % 2**32)
    torch.manual_seed(seed)


def _numpy_random() -> Any:
    # imported on use: this module works without numpy, but a user's loader may use numpy's random state
    try:
        return importlib.import_module("numpy.random")
    except ImportError:
        return None


class Shared:
    """Context of process-wide settings that several users share: the first to enter sets, the last to leave restores.

    Users may leave in any order and in any thread. A call returns a context manager for `with`.
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
    """Hide output, logs and warnings of torch, torchao and the exporters in the block: users cannot act on them.

    Errors are raised as usual. Use it only around calls of libraries. Output belongs to the whole process, so the
    output of other threads is hidden meanwhile, too.
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
    """Make `nn.TransformerEncoder` and `nn.MultiheadAttention` call their submodules, and treat any mask as data.

    In eval mode PyTorch computes both in one fused kernel, which is opaque to runtimes, hooks and quantizers. Other
    threads also run without that kernel meanwhile; their results are the same.
    """
    fast_path, detect = torch.backends.mha.get_fastpath_enabled(), transformer._detect_is_causal_mask

    def causal(mask: Tensor | None, is_causal: bool | None = None, size: int | None = None) -> bool:
        """Whether a causal kernel may replace the mask; during a capture only if the caller passes `is_causal`.

        PyTorch compares the mask's values, which are not available in a capture. Keeping the mask is correct for every
        value, in the capture and for later masks.
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


@Shared
@contextmanager
def differentiable_checkpoints() -> Iterator[None]:
    """Let `torch.utils.checkpoint` recompute activations in a way that `torch.autograd.grad` allows.

    With `use_reentrant=True` it calls `backward()` inside the backward pass: that fails in `torch.autograd.grad`, and
    outputs of the checkpointed part have no gradients. Its other implementation computes the same values. Other threads
    also use that one meanwhile.
    """
    reentrant = torch_checkpoint.CheckpointFunction

    class Recomputed:
        @staticmethod
        def apply(function: Callable[..., Any], preserve_rng_state: bool, *args: Any) -> Any:
            return torch_checkpoint.checkpoint(
                function, *args, use_reentrant=False, preserve_rng_state=preserve_rng_state
            )

    torch_checkpoint.CheckpointFunction = Recomputed
    try:
        yield
    finally:
        torch_checkpoint.CheckpointFunction = reentrant


@contextmanager
def torch_threads(count: int | None) -> Iterator[None]:
    """Run the block with `count` intra-op threads, then restore the number; None changes nothing."""
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
    """Issue a warning that points at the first caller outside of this package."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and str(frame.f_globals.get("__name__", "")).partition(".")[0] == "torchslim":
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Run the block with `model` in eval mode and without gradients, then restore every module's mode."""
    with eval_mode(model), torch.no_grad():
        yield


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Run the block like `evaluating`, then restore buffers and random state, which a forward pass may change."""
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
