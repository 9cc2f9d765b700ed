"""Saved programs that others wrote: what exporting never emits is refused before torch sees it, and quickly."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.support.program_files import JSON, changed, from_file, nodes, retarget
from torchslim.core.isolation import quiet
from torchslim.errors import ArtifactError
from torchslim.graph.export import capture
from torchslim.runtimes.program_operators import resolve
from torchslim.runtimes.program_sizes import Unfit, check_expression
from torchslim.runtimes.pt2 import load_program, pack_program

pytestmark = pytest.mark.timeout(120)  # what hangs fails


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.nn.functional.gelu(self.layer(x), approximate="tanh")
        return torch.cat([x, x.reshape(x.shape[0] * 2, 1).reshape(-1, 2)], 1)


@pytest.fixture(scope="module")
def honest() -> bytes:
    return pack_program(capture(Net(), (torch.randn(3, 4),)).program)


def sizes(program: JSON) -> list[JSON]:
    values = program["graph_module"]["graph"]["tensor_values"].values()
    return [size for each in values for size in each["sizes"] if "as_expr" in size]


def resized(text: str) -> Callable[[JSON], None]:
    return lambda program: sizes(program)[0]["as_expr"].update(expr_str=text)


def full(*size: int) -> Callable[[JSON], None]:
    return lambda program: retarget(
        program, "torch.ops.aten.full.default", size={"as_ints": list(size)}, fill_value={"as_float": 1.0}
    )


def set_text(program: JSON, text: str) -> None:
    node = next(each for each in nodes(program) if "gelu" in each["target"])
    next(each for each in node["inputs"] if each["name"] == "approximate")["arg"] = {"as_string": text}


def pieces(program: JSON) -> None:
    """A list of as many tensors as a dimension is long."""
    retarget(program, "torch.ops.aten.arange.default", end={"as_int": 2**25})
    nodes(program)[0].update(name="long", outputs=[{"as_tensor": {"name": "long"}}])
    values = program["graph_module"]["graph"]["tensor_values"]
    values["long"] = json.loads(json.dumps(next(each for each in values.values() if len(each["sizes"]) == 1)))
    tensor = {"name": "self", "arg": {"as_tensor": {"name": "long"}}, "kind": 1}
    nodes(program).insert(1, json.loads(json.dumps(nodes(program)[0])))
    nodes(program)[1].update(
        target="torch.ops.aten.unbind.int", name="cut", inputs=[tensor], outputs=[{"as_tensors": [{"name": "one"}]}]
    )
    values["one"] = values["long"]
    del nodes(program)[2:]
    program["graph_module"]["graph"]["outputs"] = [{"as_tensor": {"name": "one"}}]
    program["graph_module"]["signature"]["output_specs"] = [{"user_output": {"arg": {"as_tensor": {"name": "one"}}}}]


def deep(program: JSON) -> None:
    program["graph_module"]["module_call_graph"][0]["signature"]["in_spec"] = "[" * 50_000


def enum(program: JSON) -> None:
    tree = (
        '{"type": "builtins.dict", "context": "{\\"__enum__\\": true, \\"fqn\\": \\"os:path\\"}", "children_spec": []}'
    )
    program["graph_module"]["module_call_graph"][0]["signature"]["in_spec"] = f"[1, {tree}]"


ATTACKS: dict[str, tuple[Callable[[JSON], None], str]] = {
    "a file": (from_file(Path("/etc/hostname")), "calls 'torch.ops.aten.from_file.default'"),
    "a text of another list": (lambda program: set_text(program, "/etc/hostname"), "has '/etc/hostname' as 'approximate'"),
    "storage": (lambda program: retarget(program, "torch.ops.aten.set_.source_Tensor"), "calls"),
    "seed": (lambda program: retarget(program, "torch.ops.aten.manual_seed.default"), "calls"),
    "another library": (lambda program: retarget(program, "torch.ops.profiler._record_function_enter.default"), "calls"),
    "higher order": (lambda program: retarget(program, "torch.ops.higher_order.while_loop"), "calls"),
    "loading": (lambda program: retarget(program, "torch.ops.load_library"), "calls"),
    "math": (lambda program: retarget(program, "math.factorial", x={"as_int": 10**8}), "calls 'math.factorial'"),
    "a power of powers": (resized("9**9**9**9"), "could run code"),
    "powers": (resized("Pow(Integer(9), Pow(Integer(9), Integer(9)))"), "exponent"),
    "a tower": (resized("Pow(Pow(Pow(Integer(9), Integer(16)), Integer(16)), Integer(16))"), "more than 1024 bits"),
    "a long expression": (resized("Add(" * 300 + "Integer(1)" + ")" * 300), "levels|expression"),
    "a range up to which torch counts": (
        lambda program: program["range_constraints"].update(u99999999999={"min_val": 0, "max_val": 1}), "range for",
    ),
    "a terabyte": (full(2**20, 2**20), "sizes of more than"),
    "four gigabytes": (full(2**30), "would take"),
    "pieces": (pieces, "would cut"),
    "an object": (lambda program: program["graph_module"]["graph"].update(custom_obj_values={"a": {"name": "a", "class_fqn": "b"}}), "no tensors"),
    "an unknown field": (lambda program: nodes(program)[0].update(extra=1), "has 'extra'"),
    "a number for a text": (lambda program: nodes(program)[0].update(target=3), "target is 3"),
    "a missing field": (lambda program: program.pop("graph_module"), "lacks 'graph_module'"),
    "two kinds at once": (lambda program: nodes(program)[0]["inputs"][0].update(arg={"as_int": 1, "as_none": True}), "must have one of"),
    "another device": (
        lambda program: next(iter(program["graph_module"]["graph"]["tensor_values"].values()))["device"].update(type="cuda"), "is on 'cuda'",
    ),
    "a sparse tensor": (
        lambda program: next(iter(program["graph_module"]["graph"]["tensor_values"].values())).update(layout=1), "not dense",
    ),
    "a deep tree": (deep, "nested deeper"),
    "an enumeration": (enum, "in_spec"),
    "a name in generated code": (lambda program: nodes(program)[0].update(name="x=1;y"), "has the name 'x=1;y'"),
    "a power at run time": (
        lambda program: retarget(program, "_operator.pow", a={"as_int": 9}, b={"as_int": 10**9}), "exponent above 64",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ATTACKS)
def test_what_exporting_never_writes_is_refused(name: str, honest: bytes) -> None:
    change, message = ATTACKS[name]
    with pytest.raises(ArtifactError, match=message):
        load_program(io.BytesIO(changed(honest, change)))


def test_a_file_is_neither_written_nor_read(honest: bytes, tmp_path: Path) -> None:
    """torch itself maps the file and writes to it; when it no longer does, the check can go."""
    path = tmp_path / "victim"
    path.write_bytes(bytes(32))
    data = changed(honest, from_file(path))
    with quiet(), torch.no_grad():
        module = torch.export.load(io.BytesIO(data)).module(check_guards=False)
        found = next(node for node in module.graph.nodes if "from_file" in str(node.target))
        found.target(*found.args, **found.kwargs).fill_(1.0)
    assert path.read_bytes() != bytes(32)
    before = path.read_bytes()
    with pytest.raises(ArtifactError, match="from_file"):
        load_program(io.BytesIO(data))
    assert path.read_bytes() == before


WEIGHTS = "model_weights_config.json"


def first_weight(config: JSON) -> JSON:
    return next(iter(config["config"].values()))  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda config: first_weight(config)["tensor_meta"].update(sizes=[{"as_int": 2**40}, {"as_int": 4}]), "has the sizes"),
        (lambda config: first_weight(config)["tensor_meta"].update(sizes=[{"as_int": 2**20}, {"as_int": 4}]), "larger than"),
        (lambda config: first_weight(config)["tensor_meta"].update(sizes=[{"as_int": 2**31}, {"as_int": 1}], strides=[{"as_int": 0}] * 2), "stands for"),
        (lambda config: first_weight(config)["tensor_meta"].update(storage_offset={"as_int": -1}), "larger than"),
        (lambda config: first_weight(config)["tensor_meta"].update(dtype=99), "dtype is 99"),
        (lambda config: first_weight(config).update(path_name="../../secret"), "which is missing"),
        (lambda config: first_weight(config).update(tensor_meta=None), "unpickling"),
        (lambda config: config["config"].update({'a"b': first_weight(config)}), "unsafe key"),
    ],
    ids=range(8),
)  # fmt: skip
def test_weights_that_do_not_fit_their_bytes_are_refused(change: Any, message: str, honest: bytes) -> None:
    with pytest.raises(ArtifactError, match=message):
        load_program(io.BytesIO(changed(honest, change, WEIGHTS)))


def test_a_program_is_never_unpacked_to_more_than_its_size(honest: bytes) -> None:
    source, buffer = zipfile.ZipFile(io.BytesIO(honest)), io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in source.namelist():
            archive.writestr(name, source.read(name))
        archive.writestr("archive/data/weights/weight_7", bytes(2**24))
    with pytest.raises(ArtifactError, match="compressed"):
        load_program(io.BytesIO(buffer.getvalue()))


def test_texts_of_assertions_are_replaced() -> None:
    class Asserts(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            count = x.sum().int().item()
            torch._check(count >= 0)  # type: ignore[operator]
            return x + count

    data = pack_program(torch.export.export(Asserts(), (torch.ones(3),)))
    program = load_program(io.BytesIO(data))
    texts = [
        arg for node in program.graph.nodes if "assert" in str(node.target) for arg in node.args if isinstance(arg, str)
    ]
    assert set(texts) == {"an assertion of the program does not hold"}


def test_operators_of_the_tables_alone_are_allowed() -> None:
    """The pure operators that models are made of, and none that touch anything but their tensors."""
    for name in ("conv2d.default", "linear.default", "relu_.default", "lstm.input", "layer_norm.default", "_softmax.default",
                 "scaled_dot_product_attention.default", "index_put_.default", "copy_.default", "sym_size.int", "item.default",
                 "to.dtype", "einsum.default", "div.Tensor_mode", "multinomial.default", "dropout.default"):  # fmt: skip
        assert resolve(f"torch.ops.aten.{name}") is not None, name
    unknown = ("from_file.default", "set_.source_Tensor", "set_data.default", "resize_.default", "pin_memory.default",
               "manual_seed.default", "seed.default", "save.default", "_print.default", "warn.default", "cuda.default",
               "record_stream.default", "add.out", "as_tensor.list", "append.t", "_foobar.default", "to_sparse.default",
               "requires_grad_.default", "shallow_copy_data_.default", "_cufft_set_plan_cache_max_size.default")  # fmt: skip
    assert [name for name in unknown if resolve(f"torch.ops.aten.{name}") is not None] == []
    others = ("torch.ops.quantized.linear_prepack.default", "torch.ops.prim.Print.default", "torch.ops.inductor._alloc_from_pool.default",
              "torch.ops.aten.add", "torch.os.system", "torch.ops.aten.__class__.mro", "torch.load", "#a:b", "", "_operator.call")  # fmt: skip
    assert [name for name in others if resolve(name) is not None] == []


EXPRESSIONS = st.recursive(
    st.just("Symbol('s0', positive=True, integer=True)") | st.integers(-(2**40), 2**40).map(lambda n: f"Integer({n})"),
    lambda inner: st.builds("{0}({1}, {2})".format, st.sampled_from(["Add", "Mul", "FloorDiv", "Mod", "Max", "Min"]), inner, inner)
    | st.builds("Pow({0}, Integer({1}))".format, inner, st.integers(-1, 16)),
    max_leaves=12,
)  # fmt: skip


@given(EXPRESSIONS)
def test_what_the_grammar_takes_sympy_evaluates_at_once(text: str) -> None:
    import sympy
    from torch.utils._sympy.functions import FloorDiv, Mod

    try:
        check_expression(text)
    except Unfit:
        return
    with suppress(ZeroDivisionError, AssertionError, ValueError, TypeError):
        assert sympy.sympify(text, locals={"FloorDiv": FloorDiv, "Mod": Mod}) is not None


@given(st.text(alphabet="abS()'\"*.,_0123456789[]{}=-+ :lambdimport", max_size=60))
def test_any_other_text_is_no_expression(text: str) -> None:
    with pytest.raises(Unfit):
        check_expression(text + "+x")
