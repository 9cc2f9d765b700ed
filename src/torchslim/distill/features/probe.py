"""Finds the outputs of a model that can be tapped, and their batch, channel and position dimensions.

A run gives the shapes, a run on fewer samples shows the batch dimension, and a run on shorter sequences shows the
positions that a mask applies to. If the model rejects such inputs, sizes decide.
"""

from __future__ import annotations

import math
import weakref
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.fx import Node

from torchslim.core.batches import Batch, batch_size, call
from torchslim.core.task import Task
from torchslim.core.trees import device_of, dtype_of, tensors, to_device, to_dtype
from torchslim.distill.features.align import Shape
from torchslim.distill.features.padding import Padding, fewer, find_padding, masks_of, shorter
from torchslim.distill.features.taps import Tap, dry, first_feature, graph_of, modules_by_path, nodes_by_path, watched

CHANNELS_LAST = (nn.Linear, nn.LayerNorm, nn.RMSNorm, nn.Embedding, nn.RNNBase, nn.MultiheadAttention)
WIDTHS = ("out_channels", "out_features", "num_features", "num_channels", "embedding_dim", "embed_dim", "nf")
FIRST_TOKENS = 8  # at most: of classes, distillation, registers
CONVOLUTIONS = ("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")


@dataclass(frozen=True, slots=True)
class _Width:
    """Layer type, number of channels and channel stride of the last output of a layer that multiplies or normalizes."""

    kind: type
    channels: int
    stride: int | None


@dataclass(slots=True)
class _Run:
    """Outputs of a run in order: their paths, sizes, strides and widths; and the sizes of the model's logits."""

    paths: list[str] = field(default_factory=list)
    sizes: list[Shape] = field(default_factory=list)
    strides: list[Shape] = field(default_factory=list)
    widths: list[_Width | None] = field(default_factory=list)
    own: list[bool] = field(default_factory=list)  # is it the model's own output?
    answer: Shape = ()


def observe(model: nn.Module, task: Task, batch: Batch) -> list[Tap]:
    """Possible taps, in the order in which the modules end, without the model's own output.

    Args:
        model: a module, or a graph that was captured from one.
        task: gives the model's inputs from a batch.
        batch: the model runs on it, on fewer samples of it, and on shorter sequences.
    """
    batch = to_device(batch, device_of(model))
    inputs, masks = task.inputs(batch), masks_of(task, batch)
    samples = batch_size(inputs)
    full = _run(model, task, inputs)
    part, count = fewer(inputs, samples)
    few = _likewise(model, task, part, full)
    count = samples if few is None else count
    short = [_likewise(model, task, shorter(task, batch, number), full) for number in range(len(masks))]
    images = [tuple(tensor.shape[2:]) for tensor in tensors(inputs) if tensor.dim() == 4 and tensor.is_floating_point()]
    calls, seen, taps = Counter(full.paths), Counter[str](), []
    owners = _owners(model)
    for place, path in enumerate(full.paths):
        turn, sizes = seen[path], full.sizes[place]
        seen[path] += 1
        if full.own[place]:
            continue
        few_sizes = sizes if few is None else few.sizes[place]
        batches = [dim for dim in range(len(sizes)) if (sizes[dim], few_sizes[dim]) == (samples, count)]
        short_sizes = [run.sizes[place] for run in short if run is not None]
        moved = [dim for dim, size in enumerate(sizes) if any(other[dim] != size for other in short_sizes)]
        dims = _dims(owners[path], sizes, full.strides[place], batches, moved, full.widths[place])
        if dims is None:
            continue
        shape = _placed(sizes, dims)
        at = [None if run is None else _placed(run.sizes[place], dims)[1:] for run in short]
        kind, weights = _kind(owners[path], path), _weights(owners[path])
        padding, patches = find_padding(masks, shape[1:], at), _patches(shape, images[0] if images else None)
        taps.append(Tap(path, turn, calls[path], shape, *dims, padding, kind, weights, patches))
    return taps


@dataclass(frozen=True, slots=True)
class AnswerPadding:
    """Padding of the logits by a mask of a batch; `first` is their first dimension of positions."""

    padding: Padding
    first: int

    def over(self, masks: Sequence[Tensor | None], logits: Tensor) -> Tensor | None:
        """Mask (batch, *positions), True where a position counts; None without a mask."""
        return self.padding.over(masks, logits.shape[1:-1] if self.first == 1 else logits.shape[2:])


def answer_padding(model: nn.Module, task: Task, batch: Batch) -> AnswerPadding | None:
    """Padding of the logits; None if no mask applies to their positions, as with one prediction for a sample."""
    batch = to_device(batch, device_of(model))
    masks = masks_of(task, batch)
    if all(mask is None for mask in masks):
        return None
    full = _run(model, task, task.inputs(batch), watch=False)
    for number, mask in enumerate(masks if len(full.answer) > 2 else ()):
        run = _likewise(model, task, shorter(task, batch, number), full, watch=False)
        for first, last in ((1, -1), (2, len(full.answer))):  # of tokens, of pixels
            positions = full.answer[first:last]
            if run is not None:
                padding = find_padding([mask], positions, [run.answer[first:last]])
            else:
                padding = Padding(0, 0) if mask is not None and mask.shape[1:] == positions else None
            if padding is not None:
                return AnswerPadding(Padding(number, padding.extra), first)
    return None


def _run(model: nn.Module, task: Task, inputs: Any, *, watch: bool = True) -> _Run:
    owners, run = _owners(model) if watch else {}, _Run()
    outputs: list[Any] = []  # weak references: all activations of a batch together would be large
    width: _Width | None = None

    def keep(path: str, output: Any) -> None:
        nonlocal width
        tensor = first_feature(output)
        width = _width(owners[path], tensor) or width
        if tensor is not None:
            outputs.append(weakref.ref(tensor))
            run.paths.append(path)
            run.sizes.append(tuple(tensor.shape))
            run.strides.append(tensor.stride())
            run.widths.append(width)

    with watched(model, keep, owners), dry(model):
        result = call(model, to_dtype(inputs, dtype_of(model)))
        answer = first_feature(result)
        run.own = [answer is not None and output() is answer for output in outputs]
        run.answer = tuple(task.logits(result).shape)
    return run


def _likewise(model: nn.Module, task: Task, inputs: Any, reference: _Run, *, watch: bool = True) -> _Run | None:
    """Run on other inputs; None if the model rejects them, or its outputs differ in modules or in ranks."""
    if inputs is None:
        return None
    try:
        run = _run(model, task, inputs, watch=watch)
    except Exception:  # noqa: BLE001 - a model may raise anything on sizes that it is not made for
        return None
    alike = run.paths == reference.paths and [*map(len, run.sizes)] == [*map(len, reference.sizes)]
    return run if alike and len(run.answer) == len(reference.answer) else None


def _owners(model: nn.Module) -> Mapping[str, Any]:
    program = graph_of(model)
    return modules_by_path(model) if program is None else nodes_by_path(program)


def _width(owner: Any, output: Tensor | None) -> _Width | None:
    """Output channels of a layer that multiplies or normalizes; None for any other module or node."""
    if isinstance(owner, Node):
        name, value = str(owner.target), owner.meta["val"]
        if any(f".{operation}." in f"{name}." for operation in CONVOLUTIONS):
            return _Width(nn.Conv2d, value.shape[1], None)
        return _Width(nn.Linear, value.shape[-1], None) if ".linear." in f"{name}." else None
    if not owner._parameters or any(True for _ in owner.children()):
        return None
    width = next((getattr(owner, name) for name in WIDTHS if isinstance(getattr(owner, name, None), int)), None)
    if isinstance(owner, nn.RNNBase):
        width = (owner.proj_size or owner.hidden_size) * (2 if owner.bidirectional else 1)
    elif width is None and isinstance(shape := getattr(owner, "normalized_shape", None), (tuple, list)) and shape:
        width = shape[-1]
    if width is None:
        return None
    last = issubclass(type(owner), CHANNELS_LAST)
    return _Width(type(owner), width, None if output is None else output.stride(-1 if last else 1))


def _dims(
    owner: Any, sizes: Shape, strides: Shape, batches: Sequence[int], moved: Collection[int], width: _Width | None
) -> tuple[int, int] | None:
    """Dimension of the batch, and of the channels once the batch comes first; None if the output has no batch.

    The dimensions `batches` changed with the number of samples, the dimensions `moved` with the length of a sequence.
    """
    if len(sizes) == 2:
        return (0, 1) if 0 in batches else None
    late = isinstance(owner, (nn.RNNBase, nn.MultiheadAttention)) and not owner.batch_first
    likely = [dim for dim in ((1, 0) if late else (0, 1)) if dim in batches]
    if not likely:
        return None
    batch = likely[0]
    rest = [dim for dim in range(len(sizes)) if dim != batch]
    ends = [place for place in (0, -1) if width is not None and sizes[rest[place]] == width.channels]
    ends = [place for place in ends if rest[place] not in moved] or ends
    if width is None or not ends:
        return batch, (-1 if len(sizes) == 3 else 1) if width is None else _usual(width)
    if len(ends) > 1:  # as many positions as channels: the channels have the stride of the layer's output
        ends = [place for place in ends if strides[rest[place]] == width.stride]
    return batch, _usual(width) if len(ends) != 1 else 1 if ends[0] == 0 else -1


def _usual(width: _Width) -> int:
    return -1 if issubclass(width.kind, CHANNELS_LAST) else 1


def _placed(sizes: Shape, dims: tuple[int, int]) -> Shape:
    """Shape (channels, *positions) of an output of these sizes."""
    rest = [*sizes[: dims[0]], *sizes[dims[0] + 1 :]]
    channels = rest.pop(dims[1] - 1 if dims[1] > 0 else dims[1])
    return channels, *rest


def _patches(shape: Shape, image: Shape | None) -> tuple[int, Shape] | None:
    """Number of tokens before those of an image's patches, and the patches' grid, which has the image's aspect."""
    if image is None or len(shape) != 2:
        return None
    for first in range(min(FIRST_TOKENS, shape[1] - 1) + 1):
        height = math.isqrt((shape[1] - first) * image[0] // image[1])
        if height and height * height * image[1] == (shape[1] - first) * image[0]:
            return first, (height, (shape[1] - first) // height)
    return None


def _kind(owner: Any, path: str) -> str:
    if isinstance(owner, nn.Module):
        return type(owner).__name__
    stack = (owner.meta.get("nn_module_stack") or {}).values()
    return next((str(kind).rpartition(".")[2] for where, kind in stack if f".{where}".endswith(f".{path}")), "")


def _weights(owner: Any) -> int:
    return sum(parameter.numel() for parameter in owner.parameters()) if isinstance(owner, nn.Module) else 1
