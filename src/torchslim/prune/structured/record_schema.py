"""Strict schema of a record of removed channels, such as `surgery.json`: names, numbers and shapes."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field
from typing_extensions import TypedDict

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


class RoundJson(TypedDict):
    """The channels that one pruning removed."""

    __pydantic_config__ = STRICT  # type: ignore[misc]
    cuts: list[CutJson]
    patches: list[PatchJson]
    about: dict[str, Any]


BaseJson = TypedDict("BaseJson", {"class": Name, "shapes": Hash})
BaseJson.__pydantic_config__ = STRICT  # type: ignore[attr-defined]


class SurgeryJson(TypedDict):
    """What channel pruning removed from a module; see `torchslim.surgery`."""

    __pydantic_config__ = STRICT  # type: ignore[misc]
    version: Annotated[int, Field(ge=1)]  # a newer one is refused where the record is used
    base: BaseJson
    rounds: Annotated[list[RoundJson], Field(max_length=10_000)]
