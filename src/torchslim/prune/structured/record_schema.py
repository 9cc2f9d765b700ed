"""Strict schema of a record of removed channels and blocks, such as `surgery.json`: names, numbers and shapes."""

from __future__ import annotations

from typing import Annotated, Any, NotRequired

from pydantic import Field
from typing_extensions import TypeAliasType, TypedDict

from torchslim.core.json_types import STRICT, Axis, Hash, Name, Size


class CutJson(TypedDict):
    """The indices of one dimension of a weight that are kept."""

    __pydantic_config__ = STRICT  # type: ignore[misc]
    weight: Name
    dim: Axis
    size: Size
    kept: list[Size]


class PatchJson(TypedDict):
    """The change of a module's attribute that holds a size."""

    __pydantic_config__ = STRICT  # type: ignore[misc]
    module: Name
    name: Annotated[str, Field(pattern=r"^[^\W\d_]\w{0,199}$")]
    place: Annotated[list[Size], Field(max_length=16)]
    old: Annotated[int, Field(ge=-(2**40), le=2**40)]
    new: Annotated[int, Field(ge=-(2**40), le=2**40)]


Place = Annotated[list[Name | Size], Field(min_length=1, max_length=16)]
"""Where a call has a value: the name of an argument, then indices and keys inside of it."""

Shape = Annotated[list[Size], Field(max_length=64)]
Sized = Annotated[list[Annotated[int, Field(ge=-64, le=2**40)]], Field(max_length=64)]


class GivenJson(TypedDict):
    """An argument that a bypass returns."""

    __pydantic_config__ = STRICT  # type: ignore[misc]
    given: Place


class ZerosJson(TypedDict):
    """Zeros that a bypass returns: a negative size -1 - i is that of the argument's dimension i."""

    __pydantic_config__ = STRICT  # type: ignore[misc]
    zeros: Place
    shape: Sized | None


class ValueJson(TypedDict):
    """A plain value that a bypass returns."""

    __pydantic_config__ = STRICT  # type: ignore[misc]
    value: bool | int | float | Name | None


class TupleJson(TypedDict):
    """A tuple that a bypass returns."""

    __pydantic_config__ = STRICT  # type: ignore[misc]
    tuple: Annotated[list[Returned], Field(max_length=1_000)]


class ListJson(TypedDict):
    """A list that a bypass returns."""

    __pydantic_config__ = STRICT  # type: ignore[misc]
    list: Annotated[list[Returned], Field(max_length=1_000)]


class DictJson(TypedDict):
    """A dict that a bypass returns."""

    __pydantic_config__ = STRICT  # type: ignore[misc]
    dict: Annotated[dict[Name, Returned], Field(max_length=1_000)]


Returned = TypeAliasType("Returned", GivenJson | ZerosJson | ValueJson | TupleJson | ListJson | DictJson)


class DropJson(TypedDict):
    """A removed module, what is returned in its place, and the tensors that the model's state lost."""

    __pydantic_config__ = STRICT  # type: ignore[misc]
    module: Annotated[Name, Field(min_length=1)]
    returned: Returned
    tensors: dict[Name, Shape]
    ties: dict[Name, Name]


class RoundJson(TypedDict):
    """What one pruning removed."""

    __pydantic_config__ = STRICT  # type: ignore[misc]
    cuts: list[CutJson]
    patches: list[PatchJson]
    drops: NotRequired[list[DropJson]]  # absent from records of older versions
    about: dict[str, Any]


BaseJson = TypedDict("BaseJson", {"class": Name, "shapes": Hash})
BaseJson.__pydantic_config__ = STRICT  # type: ignore[attr-defined]


class SurgeryJson(TypedDict):
    """What pruning removed from a module; see `torchslim.surgery`."""

    __pydantic_config__ = STRICT  # type: ignore[misc]
    version: Annotated[int, Field(ge=1)]  # a newer one is refused where the record is used
    base: BaseJson
    rounds: Annotated[list[RoundJson], Field(max_length=10_000)]
