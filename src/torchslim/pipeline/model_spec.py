"""A model and its example inputs as a command line names them: "package.module:callable" and "1x3x224x224"."""

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

MOST = 2**30  # numbers of an input
WRITTEN = re.compile(r"(?:(?P<name>[A-Za-z_]\w*)=)?(?P<sizes>\d+(?:x\d+)*)(?::(?P<dtype>\w+))?")


def load_model(spec: str, inputs: Sequence[str] = ()) -> tuple[nn.Module, Inputs]:
    """The model that `spec` names or makes, and inputs that it runs on.

    Args:
        spec: "package.module:name" of a module, or of a callable that gives one, or (model, example_inputs).
        inputs: as for `make_inputs`; they go before those that the callable gives.

    Raises:
        RecipeError: nothing that can be imported, no model, no inputs, or a model that does not run on them.
    """
    found = resolve(spec, "model")
    if not isinstance(found, nn.Module):
        if not callable(found):
            raise RecipeError(f"model {spec!r} must be an nn.Module or give one, got {type(found).__name__}")
        with foreign(f"model {spec!r} cannot be made", RecipeError):
            found = found()
    model, given = found if isinstance(found, tuple) and len(found) == 2 else (found, None)
    if not isinstance(model, nn.Module):
        raise RecipeError(
            f"model {spec!r} must give an nn.Module or (model, example_inputs), got {type(model).__name__}"
        )
    if inputs:
        given = make_inputs(inputs)
    if not isinstance(given, (tuple, list, dict)):
        raise RecipeError(
            f"model {spec!r} comes without example inputs; give one --input for each, such as --input 1x3x224x224"
            if given is None
            else f"the example inputs of {spec!r} must be a tuple or a dict, got {type(given).__name__}"
        )
    given = tuple(given) if isinstance(given, list) else given
    with foreign(f"{spec!r} does not run on these inputs", RecipeError), untouched(model):
        call(model, to_device(given, device_of(model)))
    return model, given


def make_inputs(written: Sequence[str]) -> Inputs:
    """Tensors for "[name=]sizes[:dtype]": floats from a seeded normal, whole numbers 0 or 1, booleans true.

    >>> [value.shape for value in make_inputs(["1x3x8x8", "1x77:int64"])]
    [torch.Size([1, 3, 8, 8]), torch.Size([1, 77])]

    Raises:
        RecipeError: written otherwise, a dtype that torch has not, or only some with a name.
    """
    generator = torch.Generator().manual_seed(0)
    made: list[tuple[str | None, Tensor]] = []
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
            else:  # ids that every table has
                value = torch.randint(2, sizes, generator=generator).to(dtype)
        except RuntimeError as error:  # such as quantized dtypes
            raise RecipeError(
                f"input {text!r} cannot be made of {match['dtype']}; use float32, int64 or bool"
            ) from error
        made.append((match["name"], value))
    names = [name for name, _ in made if name is not None]
    if not names:
        return tuple(value for _, value in made)
    if len(set(names)) < len(made):
        raise RecipeError(f"inputs are all given by different names or all by position, got {', '.join(written)}")
    return {str(name): value for name, value in made}
