"""Translation of a program to ONNX by the exporter of torch, without its trace of the whole program.

`torch.onnx.export` runs a program on fake tensors once more to decompose it, which takes most of its time. Here nodes
for which the exporter has a translation stay as they are, and the others are decomposed one by one. The translations,
their registry and the optimizer's passes are the exporter's own. Programs that cannot be decomposed node by node go
through `torch.onnx.export`.

This file and `onnx_optimizer.py` use private parts of the exporter; their tests fail when these change.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import cache, lru_cache
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node
from torch.onnx.errors import OnnxExporterError

from torchslim.graph.decompose_nodes import NotLocal, Table, decompose_nodes
from torchslim.runtimes.onnx_optimizer import optimize

REASON = 200  # characters
Translations = Mapping[Callable[..., Any], Callable[..., Any]]


def to_onnx_program(program: ExportedProgram, translations: Translations, notes: list[str] | None = None) -> Any:
    """The optimized ONNX program, `torch.onnx.ONNXProgram`.

    Args:
        program: not modified.
        translations: translations of operations that the exporter has none for, by operation.
        notes: if the program cannot be translated node by node, a note with the reason is added.

    Raises:
        Exception: of many types: the exporter cannot translate the program.
    """
    try:
        return _by_nodes(program, translations)
    except (NotLocal, OnnxExporterError) as error:
        if notes is not None:
            reason = str(error).strip().partition("\n")[0][:REASON]
            notes.append(f"translated to ONNX by torch.onnx.export, which takes several times as long: {reason}")
    # the exporter has the last word, and its own message where it fails, too
    return torch.onnx.export(
        program,
        dynamo=True,
        verbose=False,
        optimize=True,
        external_data=False,
        custom_translation_table=dict(translations),
    )


def _by_nodes(program: ExportedProgram, translations: Translations) -> Any:
    from torch.onnx._internal._lazy_import import onnxscript_apis  # type: ignore[attr-defined]
    from torch.onnx._internal.exporter import _core, _dispatching

    registry, table = _registry(translations)

    def known(node: Node) -> bool:
        return _core._is_onnx_op(node.target) or _dispatching.dispatch(node, registry)[0] is not None

    simple = decompose_nodes(program, known, table)
    _convert_types(simple.graph_module)
    exported = _core._exported_program_to_onnx_program(simple, registry=registry)
    exported.model = onnxscript_apis.convert_version(exported.model, registry.opset_version)
    optimize(exported.model)
    return exported


def _convert_types(module: GraphModule) -> None:
    """Insert conversions where an operation takes several types, as the exporter does.

    Its own pass runs every node; the values of nodes that it leaves as they are were computed before.
    """
    from torch._dispatch.python import enable_python_dispatcher
    from torch.fx.traceback import preserve_node_meta
    from torch.onnx._internal.fx.passes import type_promotion

    class Conversion(type_promotion._TypePromotionInterpreter):
        def run_node(self, n: Node) -> Any:
            if n.op == "output":
                return None
            rule = type_promotion.get_type_promotion_rule(n, self.type_promotion_table)
            if rule is not None:
                with self._set_current_node(n):
                    self._maybe_promote_node(n, rule)
            return n.meta["val"]

    inputs = [node.meta["val"] for node in module.graph.nodes if node.op == "placeholder"]
    mode = torch._guards.detect_fake_mode(inputs)
    with mode or nullcontext(), enable_python_dispatcher(), preserve_node_meta():
        try:
            Conversion(module, _type_rules()).run(*inputs)
        except (RuntimeError, NotImplementedError) as error:  # of torch's fake tensors and of the exporter's rules
            raise NotLocal(f"types cannot be converted node by node: {type(error).__name__}: {error}") from error


@cache
def _type_rules() -> Any:
    from torch.onnx._internal.fx.passes.type_promotion import TypePromotionTable

    return TypePromotionTable()


def _registry(translations: Translations) -> tuple[Any, Table]:
    """The exporter's translations with those given, and the decompositions of operations that have none."""
    standard, table = _standard_registry(len(torch._C._dispatch_get_all_op_names()))
    if not translations:
        return standard, table
    registry = copy.copy(standard)
    registry.functions = {name: list(functions) for name, functions in standard.functions.items()}
    for operation, function in translations.items():
        registry.register_op(operation, function)
    return registry, {operation: function for operation, function in table.items() if operation not in translations}


@lru_cache(maxsize=1)
def _standard_registry(operations_in_torch: int) -> tuple[Any, Table]:
    """The exporter's own translations, which leave out operations that no library has registered so far.

    A library that is imported later, such as that of the quantized operations, changes the number of operations.
    """
    from torch.onnx._constants import ONNX_DEFAULT_OPSET
    from torch.onnx._internal.exporter import _decomp, _registration

    registry = _registration.ONNXRegistry.from_torchlib(opset_version=ONNX_DEFAULT_OPSET)
    operations = set(_decomp.get_onnx_implemented_overloads(registry))
    return registry, _decomp.create_onnx_friendly_decomposition_table(operations)
