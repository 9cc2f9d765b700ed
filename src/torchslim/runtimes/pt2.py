"""`.pt2` files: exported programs, written and read without the parts that could run code.

`torch.export.load` unpickles what it finds (sample inputs, legacy weights, custom objects), evaluates the expressions
of symbolic sizes, executes guards, and pastes names into generated code. So a file is taken apart first: only the
entries that `pack_program` writes are known, every text in them is checked for what it may say, and torch reads an
archive that is put together anew from what has passed.
"""

from __future__ import annotations

import ast
import io
import json
import re
import zipfile
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO

import torch
from torch.export import ExportedProgram

from torchslim.errors import ArtifactError, ExportError
from torchslim.isolation import quiet

PROGRAM = "models/model.json"
WEIGHTS, CONSTANTS = "data/weights/model_weights_config.json", "data/constants/model_constants_config.json"
SAMPLES = "data/sample_inputs/model.pt"
KNOWN = re.compile(
    rf"{PROGRAM}|{WEIGHTS}|{CONSTANTS}|{SAMPLES}|data/weights/weight_\d+|data/constants/tensor_\d+|archive_format|"
    r"archive_version|byteorder|\.data/version|\.data/serialization_id"
)
NAME = re.compile(r"\w*")
# paths of weights may hold what a key of a ModuleDict may, but nothing that ends a quoted text in generated code
TEXT = re.compile(r"[^\"'\\\r\n]*")
OPERATION = re.compile(
    r"torch\.ops(\.(?!__)\w+){2,3}|torch\.ops\.aten\.__i?(and|or|xor|lshift|rshift)__\.(?!__)\w+|"
    r"torch\.(_)?sym_\w+|math\.[a-z]\w*|_operator\.[a-z]\w*"
)
CALLERS = frozenset({"_operator.call", "_operator.methodcaller", "_operator.attrgetter", "_operator.itemgetter"})
TREES = frozenset({"builtins.tuple", "builtins.list", "builtins.dict", "null", "[]"})
FUNCTIONS = set(
    re.findall(
        r"\w+",
        """Symbol Integer Float Rational Add Mul Pow Max Min Abs floor ceiling sqrt Eq Ne Lt Le Gt Ge And Or Not
        Equality
    Unequality LessThan StrictLessThan GreaterThan StrictGreaterThan FloorDiv ModularIndexing Where PythonMod Mod
    CleanDiv CeilToInt FloorToInt CeilDiv LShift RShift PowByNatural FloatPow FloatTrueDiv IntTrueDiv
    IsNonOverlappingAndDenseIndicator TruncToFloat TruncToInt RoundToInt RoundDecimal ToFloat Identity""",
    )
)
EXPRESSION = (
    ast.Expression, ast.BinOp, ast.UnaryOp, ast.BoolOp, ast.Compare, ast.Name, ast.Load, ast.keyword, ast.operator,
    ast.unaryop, ast.boolop, ast.cmpop,
)  # fmt: skip


def pack_program(program: ExportedProgram) -> bytes:
    """The bytes of a `.pt2`: weights and operations, no example inputs, no traces of the exporting machine.

    Raises:
        ExportError: the program holds something that cannot be read back without unpickling.
    """
    buffer = io.BytesIO()
    example = program.example_inputs
    program._example_inputs = None  # they may be views that drag a data set along
    try:
        with quiet():
            torch.export.save(program, buffer)
        return _repacked(buffer)
    except Exception as error:
        raise ExportError(f"the program cannot be saved as a .pt2: {error}; keep its state in plain tensors") from error
    finally:
        program._example_inputs = example


def load_program(file: BinaryIO) -> ExportedProgram:
    """Read a `.pt2`; nothing in it is unpickled or run.

    Raises:
        ArtifactError: the file is damaged, or holds what `pack_program` never writes; says what was found.
    """
    data = _repacked(file)
    with quiet():
        import torchao.quantization.pt2e  # noqa: F401 - registers the operations of quantized programs

        try:
            return torch.export.load(io.BytesIO(data))
        except Exception as error:
            raise ArtifactError(f"the .pt2 file cannot be read: {type(error).__name__}: {error}") from error


def _repacked(file: BinaryIO) -> bytes:
    """The same program in a new archive that holds nothing but what has been checked."""
    entries = _entries(file)
    for name in (WEIGHTS, CONSTANTS):
        for each, text in _texts(_json(entries, name)):
            if each == "use_pickle" and text:
                raise ArtifactError(f"the .pt2 file asks for unpickling ({name}); it is not loaded")
            if isinstance(text, str) and not TEXT.fullmatch(text):
                raise ArtifactError(f"the .pt2 file has an unsafe name {text!r} in {name}; it is not loaded")
    program = _json(entries, PROGRAM)
    program["guards_code"] = []  # Python that torch would execute; sizes are checked by `Spec`
    _drop_metadata(program)
    for key, text in _texts(program):
        if isinstance(text, str) and not _harmless(key, text):
            raise ArtifactError(f"the .pt2 file has {text!r} as {key!r}, which could run code; it is not loaded")
    entries[PROGRAM] = json.dumps(program).encode()
    entries[SAMPLES] = b""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in entries.items():
            archive.writestr(zipfile.ZipInfo(f"archive/{name}"), data)
    return buffer.getvalue()


def _entries(file: BinaryIO) -> dict[str, bytes]:
    """The files of the archive, without the folder that all of them are in."""
    try:
        with zipfile.ZipFile(file) as archive:
            found = {}
            for info in archive.infolist():
                name = info.filename.partition("/")[2]
                if not KNOWN.fullmatch(name) or name in found:
                    raise ArtifactError(
                        f"the .pt2 file holds {info.filename!r}, which could be a pickle or native code; it is not "
                        "loaded"
                    )
                found[name] = archive.read(info)
    except (zipfile.BadZipFile, OSError, EOFError, NotImplementedError, RuntimeError) as error:
        raise ArtifactError(f"the .pt2 file is damaged or no .pt2 at all: {error}") from error
    if found.get(SAMPLES):
        raise ArtifactError("the .pt2 file holds pickled sample inputs; it is not loaded")
    return found


def _json(entries: Mapping[str, bytes], name: str) -> dict[str, Any]:
    try:
        value = json.loads(entries[name])
        if not isinstance(value, dict):
            raise ValueError("not an object")
    except (KeyError, ValueError) as error:
        raise ArtifactError(f"the .pt2 file is damaged: {name}: {error}") from error
    return value


def _drop_metadata(value: Any) -> None:
    """Delete the stack traces and module paths of nodes, and other text for people."""
    if isinstance(value, dict):
        if isinstance(value.get("metadata"), dict):
            value["metadata"] = {}
        for each in value.values():
            _drop_metadata(each)
    elif isinstance(value, list):
        for each in value:
            _drop_metadata(each)


def _texts(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """All leaves with the key that they are under, and all keys with an empty one."""
    if isinstance(value, dict):
        for name, each in value.items():
            yield "", name
            yield from _texts(each, name)
    elif isinstance(value, list):
        for each in value:
            yield from _texts(each, key)
    else:
        yield key, value


def _harmless(key: str, text: str) -> bool:
    if key in ("as_string", "as_strings"):  # becomes a quoted text
        return True
    if key in ("name", "as_name", "forward_arg_names"):  # become names in generated code
        return bool(NAME.fullmatch(text))
    if key in ("target", "as_operator"):
        return bool(OPERATION.fullmatch(text)) and text not in CALLERS
    if key == "expr_str":
        return _is_arithmetic(text)
    if key in ("in_spec", "out_spec"):
        try:
            return all(
                each is None or isinstance(each, int) or each in TREES
                for name, each in _texts(json.loads(text))
                if name
            )
        except ValueError:
            return False
    return bool(TEXT.fullmatch(text))


def _is_arithmetic(text: str) -> bool:
    """Is this an expression of numbers, symbols and functions of numbers, and nothing else?"""
    try:
        tree = ast.parse(text, mode="eval")
    except (SyntaxError, ValueError, RecursionError):
        return False
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            if not isinstance(node.func, ast.Name) or node.func.id not in FUNCTIONS:
                return False
        elif isinstance(node, ast.Constant):
            if isinstance(node.value, str) and not NAME.fullmatch(node.value):
                return False
        elif not isinstance(node, EXPRESSION):
            return False
    return True
