"""ONNX and OpenVINO files that others wrote: what ours never hold is refused before a runtime parses it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper
from torch import nn

import torchslim as ts
from torchslim.core.terminal import printable
from torchslim.errors import ArtifactError
from torchslim.runtimes.onnx_check import check_onnx
from torchslim.runtimes.openvino_check import check_ir


def model(*nodes: Any, tensors: tuple[Any, ...] = (), functions: tuple[Any, ...] = ()) -> Any:
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [4]) for name in "xy")
    graph = helper.make_graph(list(nodes) or [helper.make_node("Relu", ["x"], ["y"])], "g", [x], [y], list(tensors))
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], functions=list(functions))


def numbers(*values: int, name: str = "n") -> Any:
    return helper.make_tensor(name, TensorProto.INT64, [len(values)], values)


def external() -> Any:
    tensor = TensorProto(name="w", data_type=1, dims=[4], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="../secret")
    return model(tensors=(tensor,))


def huge() -> Any:
    return model(tensors=(TensorProto(name="w", data_type=1, dims=[2**40], raw_data=b"1234"),))


def calls_another() -> Any:
    opset = [helper.make_opsetid("", 18)]
    inner = helper.make_function("own", "a", ["x"], ["y"], [helper.make_node("b", ["x"], ["y"], domain="own")], opset)
    return model(helper.make_node("a", ["x"], ["y"], domain="own"), functions=(inner,))


def deep() -> Any:
    graph = model().graph
    for _ in range(12):
        graph = helper.make_graph([helper.make_node("If", ["x"], ["y"], then_branch=graph)], "g", [], [])
    return helper.make_model(graph)


BAD: dict[str, tuple[Callable[[], Any], str]] = {
    "external data": (external, "data in another file"),
    "another library": (lambda: model(helper.make_node("Run", ["x"], ["y"], domain="evil")), "of the library 'evil'"),
    "another operation": (lambda: model(helper.make_node("ImageDecoder", ["x"], ["y"])), "calls 'ImageDecoder'"),
    "a loop": (lambda: model(helper.make_node("Loop", ["x"], ["y"])), "calls 'Loop'"),
    "sizes without data": (huge, "has .* bytes"),
    "a filled terabyte": (
        lambda: model(helper.make_node("ConstantOfShape", ["n"], ["y"]), tensors=(numbers(2**20, 2**20),)),
        "ConstantOfShape of",
    ),
    "a repeated value": (
        lambda: model(helper.make_node("Constant", [], ["n"], value=numbers(2**40)), helper.make_node("Expand", ["x", "n"], ["y"])),
        "Expand of",
    ),
    "a function in a function": (calls_another, "a function calls another"),
    "deep graphs": (deep, "nested deeper"),
    "texts": (lambda: model(tensors=(helper.make_tensor("s", TensorProto.STRING, [1], [b"x"]),)), "the field 6 of a tensor"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_our_onnx_files_never_hold_is_refused(name: str) -> None:
    make, message = BAD[name]
    with pytest.raises(ArtifactError, match=message):
        check_onnx(make().SerializeToString())


def test_plain_models_pass() -> None:
    check_onnx(
        model(
            helper.make_node("Add", ["x", "w"], ["y"]), tensors=(helper.make_tensor("w", 1, [4], [1.0] * 4),)
        ).SerializeToString()
    )
    opset = [helper.make_opsetid("", 18)]
    own = helper.make_function("own", "a", ["x"], ["y"], [helper.make_node("Relu", ["x"], ["y"])], opset)
    check_onnx(model(helper.make_node("a", ["x"], ["y"], domain="own"), functions=(own,)).SerializeToString())


@pytest.mark.slow
def test_many_empty_parts_are_counted_before_they_are_made() -> None:
    node = b"\x0a\x00" * 1_100_000
    with pytest.raises(ArtifactError, match="more than 1,000,000 parts"):
        check_onnx(
            b"\x3a"
            + bytes(
                [0x80 | len(node) & 127, 0x80 | len(node) >> 7 & 127, 0x80 | len(node) >> 14 & 127, len(node) >> 21]
            )
            + node
        )


@given(st.data())
def test_damaged_onnx_files_are_refused_or_pass_and_nothing_else(data: st.DataObject) -> None:
    payload = bytearray(model(tensors=(numbers(1, 2, 3),)).SerializeToString())
    for _ in range(data.draw(st.integers(1, 4))):
        payload[data.draw(st.integers(0, len(payload) - 1))] = data.draw(st.integers(0, 255))
    try:
        check_onnx(bytes(payload[: data.draw(st.integers(0, len(payload)))]))
    except ArtifactError as error:
        message = str(error)
    else:
        message = ".onnx"
    assert ".onnx" in message


LAYER = '<layer id="{id}" name="n" type="{type}" version="{version}">{data}</layer>'
CONST = '<data element_type="{kind}" shape="{shape}" offset="{offset}" size="{size}"/>'


def ir(*layers: str, edges: str = "", more: str = "") -> bytes:
    return f'<?xml version="1.0"?><net name="m" version="11"><layers>{"".join(layers)}</layers><edges>{edges}</edges>{more}</net>'.encode()


def const(kind: str = "f32", shape: str = "4", offset: Any = 0, size: Any = 16) -> str:
    return LAYER.format(
        id=0, type="Const", version="opset1", data=CONST.format(kind=kind, shape=shape, offset=offset, size=size)
    )


IRS: dict[str, tuple[bytes, str]] = {
    "entities": (b'<?xml version="1.0"?><!DOCTYPE x [<!ENTITY a "b">]><net>&a;</net>', "document type"),
    "utf-16": (ir(const()).decode().encode("utf-16"), "is not loaded"),
    "an instruction": (b'<?xml version="1.0"?><?include x?><net/>', "instructions"),
    "an extension": (ir(LAYER.format(id=0, type="Relu", version="extension", data="")), "of extension"),
    "a loop": (ir(LAYER.format(id=0, type="Loop", version="opset5", data="")), "the operation Loop"),
    "an option": (ir(more="<rt_info><runtime_options><CACHE_DIR value='/tmp'/></runtime_options></rt_info>"), "CACHE_DIR"),
    "outside": (ir(const(offset=8)), "outside of the .bin"),
    "before": (ir(const(offset=-8)), "outside of the .bin"),
    "large": (ir(const(shape="1000000000000")), "has 16 bytes"),
    "no number": (ir(const(offset="9" * 5000)), "is not loaded"),
    "an unknown type": (ir(const(kind="string")), "is not loaded"),
    "a repeated value": (
        ir(const("i64", "2", 0, 16), LAYER.format(id=1, type="Broadcast", version="opset3", data=""),
           edges='<edge from-layer="0" from-port="0" to-layer="1" to-port="1"/>'),
        "Broadcast of",
    ),
    "deep": (b"<net>" + b"<a>" * 100 + b"</a>" * 100 + b"</net>", "nested deeper"),
    "not closed": (b"<net><layers>", "is not loaded"),
}  # fmt: skip


@pytest.mark.parametrize("name", IRS)
def test_what_our_openvino_files_never_hold_is_refused(name: str) -> None:
    xml, message = IRS[name]
    with pytest.raises(ArtifactError, match=message):
        check_ir(xml, np.array([2**20, 2**20], np.int64).tobytes())


def test_a_plain_ir_passes() -> None:
    check_ir(ir(const()), bytes(16))


@pytest.mark.slow
def test_an_artifact_with_such_a_file_is_refused(tmp_path: Path) -> None:
    from tests.support.artifacts import listed

    folder = ts.save(ts.deploy(nn.Linear(4, 2), (torch.randn(3, 4),), runtime="onnxruntime"), tmp_path / "a")
    (folder / "model.onnx").write_bytes(external().SerializeToString())
    listed(folder, "model.onnx")
    with pytest.raises(ArtifactError, match="data in another file"):
        ts.load(folder)
    assert onnx.__name__ == "onnx"


@pytest.mark.slow
def test_bench_runs_nothing_that_was_put_into_a_good_folder(tmp_path: Path) -> None:
    """Neither a changed file, nor one whose hash was made anew."""
    from tests.support.artifacts import listed
    from tests.support.program_files import changed, from_file

    victim = tmp_path / "victim"
    victim.write_bytes(bytes(32))
    folder = ts.save(nn.Linear(4, 2), tmp_path / "a", example_inputs=(torch.randn(3, 4),))
    (folder / "model.pt2").write_bytes(changed((folder / "model.pt2").read_bytes(), from_file(victim)))
    for message in ("was changed", "calls 'torch.ops.aten.from_file.default'"):
        done = subprocess.run(
            [sys.executable, folder / "bench.py", "--rounds", "1"], capture_output=True, text=True, check=False
        )
        assert done.returncode == 1
        assert message in done.stderr
        listed(folder, "model.pt2")
    assert victim.read_bytes() == bytes(32)
    manifest = json.loads((folder / "artifact.json").read_text())
    assert set(manifest["files"]) >= {"model.pt2", "bench.py"}


@given(st.text())
def test_a_terminal_gets_no_control_characters(text: str) -> None:
    shown = printable(text)
    assert not any(ord(letter) < 32 or 127 <= ord(letter) < 160 for letter in shown)
    assert printable(shown) == shown
    assert printable("a\x1b[2J\u202eb\n", lines=True) == "a\\x1b[2J\\u202eb\n"
