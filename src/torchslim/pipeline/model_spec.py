"""A model and its example inputs from command line arguments: "package.module:callable" and "1x3x224x224"."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from torchslim.core.batches import call
from torchslim.core.checks import shown
from torchslim.core.imports import foreign, resolve
from torchslim.core.isolation import untouched
from torchslim.core.step import Inputs
from torchslim.core.trees import device_of, to_device
from torchslim.errors import RecipeError

MOST = 2**30  # numbers in an input, at most
WRITTEN = re.compile(r"(?:(?P<name>[A-Za-z_]\w*)=)?(?P<sizes>\d+(?:x\d+)*)(?::(?P<dtype>\w+))?")


def load_model(spec: str, inputs: Sequence[str] = ()) -> tuple[nn.Module, Inputs]:
    """Load the model that `spec` names, and inputs on which it runs.

    Args:
        spec: "package.module:name" of a module, or of a callable that returns a module or (model, example_inputs).
        inputs: as for `make_inputs`; they take precedence over those that the callable returns.

    Raises:
        RecipeError: the name cannot be imported, is no model, has no inputs, or the model does not run on them.
    """
    source = resolve(spec, "model")
    if not isinstance(source, nn.Module):
        if not callable(source):
            raise RecipeError(f"model {spec!r} must be an nn.Module or give one, got {type(source).__name__}")
        with foreign(f"model {spec!r} cannot be made", RecipeError):
            source = source()
    model, example_inputs = source if isinstance(source, tuple) and len(source) == 2 else (source, None)
    if not isinstance(model, nn.Module):
        raise RecipeError(
            f"model {spec!r} must give an nn.Module or (model, example_inputs), got {type(model).__name__}"
        )
    if inputs:
        example_inputs = make_inputs(inputs)
    if not isinstance(example_inputs, (tuple, list, dict)):
        raise RecipeError(
            f"model {spec!r} comes without example inputs; give one --input for each, such as --input 1x3x224x224"
            if example_inputs is None
            else f"the example inputs of {spec!r} must be a tuple or a dict, got {type(example_inputs).__name__}"
        )
    example_inputs = tuple(example_inputs) if isinstance(example_inputs, list) else example_inputs
    with foreign(f"{spec!r} does not run on these inputs", RecipeError), untouched(model):
        call(model, to_device(example_inputs, device_of(model)))
    return model, example_inputs


def make_inputs(written: Sequence[str]) -> Inputs:
    """Make tensors for "[name=]sizes[:dtype]": floats from a seeded normal, integers 0 or 1, booleans true.

    >>> [value.shape for value in make_inputs(["1x3x8x8", "1x77:int64"])]
    [torch.Size([1, 3, 8, 8]), torch.Size([1, 77])]

    Raises:
        RecipeError: another format, a dtype that torch lacks, or names for only some of the inputs.
    """
    generator = torch.Generator().manual_seed(0)
    named_tensors: list[tuple[str | None, Tensor]] = []
    for text in written:
        match = WRITTEN.fullmatch(text)
        if match is None:
            raise RecipeError(
                f"an input is written as its sizes, such as 1x3x224x224, 1x77:int64 or name=1x77, got {shown(text)}"
            )
        dtype = getattr(torch, match["dtype"] or "float32", None)
        if not isinstance(dtype, torch.dtype):
            raise RecipeError(f"input {text!r}: torch has no dtype {match['dtype']!r}; use float32, int64 or bool")
        sizes = [int(size[:20]) for size in match["sizes"].split("x")]
        if math.prod(sizes) < 1:
            raise RecipeError(f"input {text!r} is empty; every size must be at least 1")
        if len(sizes) > 16 or math.prod(sizes) > MOST:
            raise RecipeError(f"input {shown(text)} is too large: at most 16 sizes and {MOST:,} numbers")
        try:
            if dtype == torch.bool:
                value = torch.ones(sizes, dtype=dtype)
            elif dtype.is_floating_point or dtype.is_complex:
                value = torch.randn(sizes, generator=generator).to(dtype)
            else:  # ids that exist in every embedding table
                value = torch.randint(2, sizes, generator=generator).to(dtype)
        except RuntimeError as error:  # such as quantized dtypes
            raise RecipeError(
                f"input {text!r} cannot be made of {match['dtype']}; use float32, int64 or bool"
            ) from error
        named_tensors.append((match["name"], value))
    names = [name for name, _ in named_tensors if name is not None]
    if not names:
        return tuple(value for _, value in named_tensors)
    if len(set(names)) < len(named_tensors):
        raise RecipeError(f"inputs are all given by different names or all by position, got {', '.join(written)}")
    return {str(name): value for name, value in named_tensors}
