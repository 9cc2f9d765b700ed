"""Statistics of a model on data: one pass gathers those that criteria need, and leaves the model unchanged.

Every statistic is a running sum, so memory is that of the model, whatever the number of batches. The model runs in eval
mode: batch norms use and keep their running statistics, dropout is off, and the samples of a batch do not mix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from torchslim.core.batches import Batch, Outputs, batch_inputs, batch_size, batch_target, call, checked, output_logits
from torchslim.core.isolation import differentiable_checkpoints, preserved_globals, unfused_attention
from torchslim.core.metrics import default_loss
from torchslim.core.parts import inside
from torchslim.core.train_modes import eval_mode
from torchslim.core.trees import device_of, to_device
from torchslim.errors import TaskError
from torchslim.prune.criteria.activations import Outlets, batched, by_sample, facing, input_squares


class Statistic(Enum):
    """A statistic that can be gathered; the value names the field of `Statistics` that holds it."""

    TAYLOR = "taylor"
    SLICE_TAYLOR = "slice_taylor"
    SQUARED_GRADIENT = "squared_gradient"
    INPUT_NORM = "input_norm"
    ACTIVATION = "activation"
    ZEROS = "zeros"
    ACTIVATION_TAYLOR = "activation_taylor"

    @property
    def needs_loss(self) -> bool:
        """Whether the batches must have labels."""
        return self in GRADIENTS or self is Statistic.ACTIVATION_TAYLOR


GRADIENTS = frozenset({Statistic.TAYLOR, Statistic.SLICE_TAYLOR, Statistic.SQUARED_GRADIENT})
OUTPUTS = frozenset({Statistic.ACTIVATION, Statistic.ZEROS, Statistic.ACTIVATION_TAYLOR})
Role = Literal["out", "in", "other"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Statistics:
    """Data about a parameter that a criterion may use besides the weight itself.

    A field is None if it was not gathered, or if no batch reached the parameter, as in an unused layer.
    `w` is the parameter, `g` the gradient of a batch's loss, which is a mean over the batch; means over batches are
    weighted by their samples. An output is measured behind the activation function that follows the module, see
    `Outlets`.

    Args:
        name: the parameter's path.
        generator: the run's randomness.
        role: whether the scored dimension holds the outputs of the parameter's module, its inputs, or neither.
        norm_scale: whether the parameter is the scale of a batch norm.
        gathered: the statistics that the pass over data was to gather.
        taylor: mean over batches of (w g)**2; of w's shape.
        slice_taylor: for each dimension of w the mean over batches of (sum of w g over a slice)**2; (w.shape[dim],).
        squared_gradient: mean over batches of size * g**2, of w's shape. With batches of one sample this is the mean of
            the samples' squared gradients; else an estimate of it that is right where gradients average to zero.
        input_norm: L2 norm of each weight's input, over all positions, root mean square over samples;
            it broadcasts against w: (1, in) for a linear layer, (1, in, *kernel) for a convolution.
        activation: mean of |output| over samples and positions; (channels,).
        zeros: share of outputs that are exactly zero; (channels,).
        activation_taylor: mean over samples of |sum over positions of a da|, with the output a and the gradient da of
            the sample's own loss; (channels,).
    """

    name: str
    generator: torch.Generator
    role: Role = "other"
    norm_scale: bool = False
    gathered: frozenset[Statistic] = frozenset()
    taylor: Tensor | None = None
    slice_taylor: tuple[Tensor, ...] | None = None
    squared_gradient: Tensor | None = None
    input_norm: Tensor | None = None
    activation: Tensor | None = None
    zeros: Tensor | None = None
    activation_taylor: Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Gathered:
    """Statistics from one pass, by parameter path, or by module path for outputs; empty without data."""

    needs: frozenset[Statistic] = frozenset()
    values: Mapping[Statistic, Mapping[str, Any]] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)  # a shared tensor's or module's other paths

    def inside(self, part: str) -> Gathered:
        """The statistics of a part at a path, by the names inside of it."""
        if not part:
            return self
        values = {
            need: {
                name: entries[self.aliases.get(key, key)]
                for key in (*entries, *self.aliases)
                if (name := inside(part, key)) is not None and self.aliases.get(key, key) in entries
            }
            for need, entries in self.values.items()
        }
        return Gathered(needs=self.needs, values=values)

    def of(
        self, path: str, *, generator: torch.Generator, role: Role = "other", norm_scale: bool = False
    ) -> Statistics:
        """The statistics of the parameter at `path` and of its module's output."""
        fields = {}
        for need in self.needs:
            key = path.rpartition(".")[0] if need in OUTPUTS else path
            fields[need.value] = self.values.get(need, {}).get(self.aliases.get(key, key))
        return Statistics(
            name=path, generator=generator, role=role, norm_scale=norm_scale, gathered=self.needs, **fields
        )


def gather(
    model: nn.Module,
    needs: Iterable[Statistic],
    batches: Iterable[Batch],
    *,
    forward: Callable[[nn.Module, Batch], Outputs] | None = None,
    loss: Callable[[Outputs, Batch], Tensor | None] | None = None,
) -> Gathered:
    """Gather `needs` in one pass over `batches`; the model, its gradients and all random states stay as they are.

    Args:
        model: any module; frozen parameters have statistics too.
        needs: what to gather.
        batches: (inputs, labels), dicts, or whatever `forward` and `loss` read.
        forward: the outputs of a batch, as `Task.forward`; None reads a batch as a `Task` does by default.
        loss: the mean loss of a batch, as `Task.compute_loss`; None is a task's default loss. Not called unless needed.

    Raises:
        TaskError: no batches, no labels where a loss is needed, or a loss that is not one finite number.
    """
    needs = frozenset(needs)
    if not needs:
        return Gathered()
    with _untouched(model) as parameters, ExitStack() as stack:
        run = _Pass(model, needs, parameters, forward or _forward, loss or _label_loss)
        stack.callback(run.release)
        stack.enter_context(differentiable_checkpoints())
        if run.differentiates and any(isinstance(module, nn.RNNBase) for module in model.modules()):
            # cuDNN has no backward for recurrent layers in eval mode
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        for number, batch in enumerate(checked(batches, "batches"), 1):
            run.batch(to_device(batch, device_of(model)), number)
    return Gathered(needs=needs, values=run.means(), aliases=_aliases(model))


def _wide(value: Tensor) -> Tensor:
    """At least float32: squares of half precision numbers overflow."""
    return value.to(torch.promote_types(value.dtype, torch.float32))


def _forward(model: nn.Module, batch: Batch) -> Outputs:
    return call(model, batch_inputs(batch))


def _label_loss(outputs: Outputs, batch: Batch) -> Tensor | None:
    target = batch_target(batch)
    return None if target is None else default_loss(output_logits(outputs), target)


def _aliases(model: nn.Module) -> dict[str, str]:
    first: dict[int, str] = {}
    named = (*model.named_modules(remove_duplicate=False), *model.named_parameters(remove_duplicate=False))
    return {path: first.setdefault(id(item), path) for path, item in named}


@contextmanager
def _untouched(model: nn.Module) -> Iterator[dict[str, nn.Parameter]]:
    """The parameters by path, in eval mode and with gradients; the model is restored afterwards."""
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    buffers = [
        (module, name, buffer, None if is_lazy(buffer) else buffer.clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]  # a module may count its calls, in eval mode too
    # the fused kernel calls no submodule, so no hook would see anything
    with preserved_globals(), unfused_attention(), torch.inference_mode(False), torch.enable_grad(), eval_mode(model):
        try:
            parameters = {
                path: parameter
                for path, parameter in model.named_parameters()
                if parameter.is_floating_point() and not is_lazy(parameter)
            }
            for weight in parameters.values():
                weight.requires_grad_(True)
            yield parameters
        finally:
            for weight, requires_grad in trainable:
                weight.requires_grad_(requires_grad)
            with torch.no_grad():
                for module, name, buffer, value in buffers:
                    module._buffers[name] = buffer
                    if value is not None and not torch.equal(buffer, value):
                        buffer.copy_(value)


class _Pass:
    """Running sums of the statistics over one pass."""

    def __init__(
        self,
        model: nn.Module,
        needs: frozenset[Statistic],
        parameters: Mapping[str, nn.Parameter],
        forward: Callable[[nn.Module, Batch], Outputs],
        loss: Callable[[Outputs, Batch], Tensor | None],
    ) -> None:
        self.model, self.needs, self.parameters = model, needs, parameters
        self.forward, self.loss = forward, loss
        self.differentiates = any(need.needs_loss for need in needs)
        self.samples = self.size = 0  # samples of the pass, and of this batch
        self.listening = False
        self.sums: dict[tuple[Statistic, str], Any] = {}
        self.inputs: dict[str, nn.Module] = {}  # the module of each input norm
        # by (module path, behind an activation function)
        self.outputs: dict[tuple[str, bool], dict[Statistic, Tensor]] = {}
        self.counts: dict[tuple[str, bool], int] = {}
        self.parts: dict[tuple[str, bool], list[Tensor]] = {}  # of this batch: (samples, channels)
        self.outlets = Outlets(self.output)
        self.paths = {id(parameter): path for path, parameter in model.named_parameters()}
        self.modules = {
            path: module for path, module in model.named_modules() if any(True for _ in module.parameters(False))
        }
        self.handles = []
        if needs & OUTPUTS:
            self.handles += [self.outlets.follow(path, module) for path, module in self.modules.items()]
        if Statistic.INPUT_NORM in needs:
            self.handles += [
                module.register_forward_hook(self.input, with_kwargs=True) for module in self.modules.values()
            ]

    def release(self) -> None:
        """Remove the hooks."""
        for handle in self.handles:
            handle.remove()

    def batch(self, batch: Batch, number: int) -> None:
        """Run one batch, and add its statistics to the sums."""
        size = self.size = batch_size(batch)
        self.samples += size
        with torch.set_grad_enabled(self.differentiates):
            outputs = self.listen(batch)
        if not self.differentiates:
            return
        loss = self.loss(outputs, batch)
        if loss is None:
            raise TaskError(
                f"batch {number} has no labels, but its gradients are needed; give (inputs, labels), or loss"
            )
        if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
            raise TaskError("the loss must be one number in a tensor that depends on the model's weights")
        if not torch.isfinite(loss):
            raise TaskError(f"the loss of batch {number} is {loss.item()}; look for bad values in it")
        # not backward(): it would change gradients that the caller holds, and run the caller's hooks
        gradients = torch.autograd.grad(loss.reshape(()), list(self.parameters.values()), allow_unused=True)
        with torch.no_grad():
            for (path, weight), gradient in zip(self.parameters.items(), gradients, strict=True):
                if gradient is not None:
                    self.gradient(path, weight, gradient, size)
            for key, parts in self.parts.items():
                # one loss depends on every use of the module: add the uses up before taking the magnitude
                same_shape = all(part.shape == parts[0].shape for part in parts)
                value = torch.stack(parts).sum(0).abs() if same_shape else torch.cat(parts).abs()
                self.add_output(key, Statistic.ACTIVATION_TAYLOR, size * value.sum(0))
        self.parts.clear()

    def listen(self, batch: Batch) -> Outputs:
        """The outputs of a batch, with the hooks on; off afterwards, so that recomputation does not count twice."""
        self.listening = True
        try:
            with self.outlets if self.needs & OUTPUTS else nullcontext():
                return self.forward(self.model, batch)
        finally:
            self.listening = False

    def gradient(self, path: str, weight: Tensor, gradient: Tensor, size: int) -> None:
        """Add the statistics of one parameter's gradient."""
        gradient = _wide(gradient)
        if Statistic.SQUARED_GRADIENT in self.needs:
            self.add(Statistic.SQUARED_GRADIENT, path, size**2 * gradient.square())
        if self.needs & {Statistic.TAYLOR, Statistic.SLICE_TAYLOR}:
            product = gradient * weight
            if Statistic.TAYLOR in self.needs:
                self.add(Statistic.TAYLOR, path, size * product.square())
            if Statistic.SLICE_TAYLOR in self.needs:
                slices = [
                    size * product.movedim(dim, 0).flatten(1).sum(1).square()
                    if product.dim() > 1
                    else size * product.square()
                    for dim in range(product.dim())
                ]
                before = self.sums.get((Statistic.SLICE_TAYLOR, path), [0.0] * len(slices))
                self.sums[Statistic.SLICE_TAYLOR, path] = [a + b for a, b in zip(before, slices, strict=True)]

    def add(self, need: Statistic, path: str, value: Tensor) -> None:
        """Add to a running sum of a parameter."""
        before = self.sums.get((need, path))
        self.sums[need, path] = value if before is None else before.add_(value)

    def add_output(self, key: tuple[str, bool], need: Statistic, value: Tensor) -> None:
        """Add to a running sum of an output."""
        sums = self.outputs.setdefault(key, {})
        sums[need] = sums[need] + value if need in sums else value

    def input(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Add the squared inputs of a module's weights (a forward hook)."""
        tensor = args[0] if args else kwargs.get("input")
        path = self.paths.get(id(getattr(module, "weight", None)))
        if not self.listening or path is None or not isinstance(tensor, Tensor):
            return
        with torch.no_grad():
            squares = input_squares(module, _wide(tensor.detach()))
        if squares is not None:
            self.inputs[path] = module
            self.add(Statistic.INPUT_NORM, path, squares)

    def output(self, path: str, output: Tensor, activated: bool) -> None:
        """Add the statistics of one output of a module."""
        batched_output = batched(self.modules[path], output)
        if not self.listening or batched_output is None:
            return
        (value, axis), key = batched_output, (path, activated)
        with torch.no_grad():
            other_dims = [dim for dim in range(value.dim()) if dim != axis]
            self.counts[key] = self.counts.get(key, 0) + value.numel() // max(value.shape[axis], 1)
            if Statistic.ACTIVATION in self.needs:
                self.add_output(key, Statistic.ACTIVATION, _wide(value.detach()).abs().sum(other_dims))
            if Statistic.ZEROS in self.needs:
                self.add_output(key, Statistic.ZEROS, (value == 0).sum(other_dims))
        if Statistic.ACTIVATION_TAYLOR in self.needs and output.requires_grad:
            activation = value.detach().clone()  # later operations may work in place
            size = self.size
            output.register_hook(
                lambda gradient: self.parts.setdefault(key, []).append(
                    by_sample(activation, gradient.reshape(activation.shape), axis, size)
                )
            )

    def means(self) -> dict[Statistic, dict[str, Any]]:
        """Means by statistic and path: the sums, divided by their counts."""
        means: dict[Statistic, dict[str, Any]] = {need: {} for need in self.needs}
        for (need, path), total in self.sums.items():
            if need is Statistic.SLICE_TAYLOR:
                means[need][path] = tuple(part / self.samples for part in total)
            elif need is Statistic.INPUT_NORM:
                means[need][path] = facing(self.inputs[path], (total / self.samples).sqrt())
            else:
                means[need][path] = total / self.samples
        for (path, activated), sums in self.outputs.items():
            if activated or (path, True) not in self.outputs:
                for need, total in sums.items():
                    count = self.samples if need is Statistic.ACTIVATION_TAYLOR else self.counts[path, activated]
                    means[need][path] = total / count
        return means
