"""Strict schemas of `artifact.json` and `surgery.json`, which are parsed here and nowhere else.

Everything in the files is data: names, numbers and shapes. Unknown keys, other types, and numbers that no model has are
refused, so that code which uses the parsed values need not check them again.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Annotated, Any, Literal, NotRequired

from pydantic import AfterValidator, Field
from typing_extensions import TypedDict

from torchslim.core.files import digest
from torchslim.core.json_types import STRICT, Axis, Hash, Name, Size, Text
from torchslim.core.schema import MIB, Limits, Schema, parse_json, shorten
from torchslim.errors import ArtifactError
from torchslim.graph.buckets import MOST as MOST_BUCKETS
from torchslim.graph.io_structure import sound, tensors_of
from torchslim.graph.size_guards import MOST, parse
from torchslim.prune.structured.record_schema import SurgeryJson

FORMAT = "torchslim-artifact"
VERSION = 1
LIMITS = Limits(size_bytes=16 * MIB, values=1_000_000, depth=48)

FILE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,199}")
PARTS = "parts"  # folder of the artifacts of a model's parts
RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)


def _guard(text: str) -> str:
    parse(text)
    return text


Shape = Annotated[list[Size], Field(max_length=64)]
Threads = Annotated[int, Field(ge=1, le=65_536)]
Dtype = Literal[
    "float16",
    "float32",
    "float64",
    "bfloat16",
    "int8",
    "int16",
    "int32",
    "int64",
    "uint8",
    "uint16",
    "uint32",
    "uint64",
    "bool",
    "complex32",
    "complex64",
    "complex128",
    "float8_e4m3fn",
    "float8_e5m2",
    "float8_e4m3fnuz",
    "float8_e5m2fnuz",
    "float8_e8m0fnu",
]


class LayerJson(TypedDict):
    """An operation that multiplies; see `torchslim.graph.layers.Layer`."""

    __pydantic_config__ = STRICT  # type: ignore[misc]
    layer: Name
    operation: Name
    macs: Annotated[int, Field(ge=0)]
    weight_bits: Annotated[int, Field(ge=1, le=128)] | None
    activations: Literal["static", "dynamic", "float"]


class SpecJson(TypedDict):
    """How a model is called; see `torchslim.runtimes.Spec`."""

    __pydantic_config__ = STRICT  # type: ignore[misc]
    kinds: dict[Name, Literal["positional", "keyword", "varargs", "varkwargs"]]
    inputs: dict[str, Any]
    outputs: dict[str, Any]
    sizes: Annotated[list[Annotated[list[Size | None], Field(max_length=64)]], Field(max_length=10_000)]
    dtypes: list[Dtype]
    batch_axis: Axis | None
    instruction_set: Name
    optional: NotRequired[list[Name]]
    notes: NotRequired[list[Text]]
    layers: NotRequired[list[LayerJson]]
    structure: NotRequired[Name]
    bfloat16: NotRequired[list[Annotated[int, Field(ge=0, le=10_000)]]]
    guards: NotRequired[Annotated[list[Annotated[Text, AfterValidator(_guard)]], Field(max_length=MOST)]]
    guard_places: NotRequired[Annotated[dict[Text, Text], Field(max_length=MOST)]]


PlaceJson = Annotated[list[Annotated[int, Field(ge=0, le=10_000)]], Field(min_length=2, max_length=2)]


class PaddingJson(TypedDict):
    """See `torchslim.graph.buckets.Padding`."""

    __pydantic_config__ = STRICT  # type: ignore[misc]
    fills: list[Literal[0, 1]]
    outputs: list[PlaceJson]


class BucketsJson(TypedDict):
    """Several programs of one model, by the sizes of their inputs; see `torchslim.graph.buckets.Buckets`."""

    __pydantic_config__ = STRICT  # type: ignore[misc]
    places: Annotated[list[PlaceJson], Field(min_length=1, max_length=1_000)]
    sizes: Annotated[list[list[Annotated[int, Field(ge=1, le=2**40)]]], Field(min_length=1, max_length=MOST_BUCKETS)]
    padding: PaddingJson | None


class ManifestJson(TypedDict):
    """An artifact's manifest."""

    __pydantic_config__ = STRICT  # type: ignore[misc]
    format: Literal["torchslim-artifact"]
    version: Literal[1]
    machine: dict[Name, Any]
    files: Annotated[dict[str, Hash], Field(max_length=10_000)]
    digest: Hash
    signature: NotRequired[Annotated[str, Field(pattern=r"^[0-9a-f]{128}$")]]
    # of a saved program
    runtime: NotRequired[Name]
    threads: NotRequired[Threads | None]
    spec: NotRequired[SpecJson]
    quantized: NotRequired[bool]
    # of saved weights
    aliases: NotRequired[dict[Name, Name]]
    channels_last: NotRequired[list[Name]]
    mask_shapes: NotRequired[dict[Name, Shape]]
    # of a model whose parts are deployed: the folder of each, by its path in the model
    parts: NotRequired[dict[Name, Name]]
    buckets: NotRequired[BucketsJson]


def _wrong_manifest(manifest: ManifestJson) -> str | None:
    outside = next((name for name in manifest["files"] if not _is_inside(name)), None)
    if outside is not None:
        return f"it names a file outside its folder: {shorten(outside)}"
    program = [key for key in ("runtime", "threads", "spec", "quantized") if key in manifest]
    if program and len(program) < 4:
        return f"it has {', '.join(program)}, but not all entries that a program needs"
    weights = [key for key in ("aliases", "channels_last") if key in manifest]
    if len(weights) != (2 if "weights.safetensors" in manifest["files"] else 0):
        return "its weights are not described"
    if ("mask_shapes" in manifest) != ("masks.safetensors" in manifest["files"]):
        return "its masks are not described"
    if "buckets" in manifest and (fault := _wrong_buckets(manifest)) is not None:
        return fault
    for path, name in manifest.get("parts", {}).items():
        if f"{PARTS}/{name}/artifact.json" not in manifest["files"]:
            return f"it lists the part {shorten(path)}, but not its files"
    return _wrong_spec(manifest["spec"]) if "spec" in manifest else None


def _wrong_buckets(manifest: ManifestJson) -> str | None:
    buckets, places = manifest["buckets"], len(manifest["buckets"]["places"])
    if list(manifest.get("parts", ())) != [str(number) for number in range(len(buckets["sizes"]))]:
        return "its buckets are not its parts"
    padding = buckets["padding"]
    if any(len(sizes) != places for sizes in buckets["sizes"]) or (padding and len(padding["fills"]) != places):
        return "its buckets do not fit its inputs"
    return None


def _is_inside(name: str) -> bool:
    """Whether a file's name stays in the folder: a plain name, `parts/PART/FILE`, or `parts/PART/parts/SIZE/FILE`."""
    words = name.split("/")
    plain = all(FILE.fullmatch(word) and not RESERVED.fullmatch(word) for word in words)
    return plain and len(words) in (1, 3, 5) and all(word == PARTS for word in words[:-1:2])


def part_folders(paths: Iterable[str]) -> dict[str, str]:
    """A folder name for each part: its path, or a number in place of a path that is no safe name."""
    return {
        path: path if FILE.fullmatch(path) and not RESERVED.fullmatch(path) else f"part-{number}"
        for number, path in enumerate(paths)
    }


def _wrong_spec(spec: SpecJson) -> str | None:
    for key in ("inputs", "outputs"):
        message = sound(spec[key])
        if message is not None:
            return f"spec.{key}: {message}"
    named = spec["inputs"].get("dict")
    if not isinstance(named, dict) or set(named) != set(spec["kinds"]):
        return "spec.kinds names other inputs than spec.inputs"
    if not set(spec.get("optional", [])) <= set(named):
        return "spec.optional names unknown inputs"
    forms = {"varargs": "tuple", "varkwargs": "dict"}
    odd = [name for name, kind in spec["kinds"].items() if kind in forms and forms[kind] not in named[name]]
    if odd or list(spec["kinds"].values()).count("varargs") > 1 or list(spec["kinds"].values()).count("varkwargs") > 1:
        return "spec.kinds does not fit spec.inputs"
    if any(tensors_of(named[name]) for name in spec.get("optional", [])):
        return "spec.optional names inputs that are tensors"
    if not len(spec["sizes"]) == len(spec["dtypes"]) == tensors_of(spec["inputs"]):
        return "spec.sizes, spec.dtypes and spec.inputs are of different numbers of tensors"
    return None


MANIFEST = Schema[ManifestJson](ManifestJson, "artifact.json", ArtifactError, limits=LIMITS, also=_wrong_manifest)
SURGERY = Schema[SurgeryJson](SurgeryJson, "surgery.json", ArtifactError, limits=LIMITS)


def parse_manifest(data: bytes, what: str) -> ManifestJson:
    """The manifest of an artifact, checked against its own digest.

    Raises:
        ArtifactError: the manifest is damaged, not torchslim's, of a newer format, or changed since it was saved.
    """
    raw = parse_json(data, what, ArtifactError, limits=LIMITS)
    version = raw.get("version") if isinstance(raw, dict) and raw.get("format") == FORMAT else None
    if type(version) is not int:
        raise ArtifactError(f"{what} is damaged or not torchslim's: it has no format and version; copy it again")
    if version > VERSION:
        raise ArtifactError(f"{what} has format version {version}, this torchslim reads up to {VERSION}; upgrade it")
    if raw.get("digest") != manifest_digest(raw):
        raise ArtifactError(f"{what} was truncated or changed since it was saved; copy the artifact again")
    return MANIFEST.parse(data, what)


def manifest_digest(manifest: Any) -> str:
    """Digest of all entries of a manifest except its digest and its signature."""
    return digest({key: value for key, value in manifest.items() if key not in ("digest", "signature")})


def checked_manifest(manifest: Any) -> ManifestJson:
    """The manifest, checked against the schema before it is written."""
    return MANIFEST.check(manifest)
