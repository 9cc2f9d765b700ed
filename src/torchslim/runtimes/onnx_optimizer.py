"""The exporter's optimizer of ONNX models: the same passes and results, in time that grows with the number of nodes.

`onnxscript.optimizer` tries every rule on every node. A rule that has two results looks through the whole graph each
time, so the time grows with the square of the number of nodes: 17 of 24 seconds for 1,144 nodes. It also infers shapes
that the exporter has already written down.

This file uses private parts of onnxscript; `tests/runtimes/test_onnx_optimizer.py` fails when they change.
"""

from __future__ import annotations

import copy
from functools import cache
from typing import Any


def optimize(model: Any) -> None:
    """Optimize a model in place, as `torch.onnx.ONNXProgram.optimize` does.

    Args:
        model: an `onnx_ir.Model`.
    """
    from onnxscript.rewriter import onnx_fusions

    _passes()(model)
    onnx_fusions.fuse(model)


def _passes() -> Any:
    """The passes of `onnxscript.optimizer.optimize_ir`, with the fold of constants and the rules of this file."""
    from onnx_ir.passes import PassManager, Sequential, common
    from onnxscript.optimizer import _constant_folding as folding
    from onnxscript.rewriter import RewritePass

    class Fold(folding.FoldConstantsPass):
        def _do_inference(self, node: Any) -> None:
            if not all(_is_known(value) for value in node.outputs):
                super()._do_inference(node)

    fold = Fold(
        shape_inference=True,
        input_size_limit=folding.DEFAULT_CONSTANT_FOLD_INPUT_SIZE_LIMIT,
        output_size_limit=folding.DEFAULT_CONSTANT_FOLD_OUTPUT_SIZE_LIMIT,
    )
    loop = [
        fold,
        RewritePass(_rules()),
        common.RemoveUnusedNodesPass(),
        common.RemoveUnusedFunctionsPass(),
        common.RemoveUnusedOpsetsPass(),
    ]
    return Sequential(
        common.InlinePass(),
        PassManager(loop, steps=2, early_stop=True),
        common.RemoveUnusedNodesPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.LiftSubgraphInitializersToMainGraphPass(),
        common.DeduplicateInitializersPass(),
        common.CommonSubexpressionEliminationPass(),
        common.OutputFixPass(),
        common.NameFixPass(),
    )


def _is_known(value: Any) -> bool:
    """Whether a value has a type and a shape of which every size is a number or has a name."""
    return (
        value.type is not None
        and value.shape is not None
        and all(isinstance(size, int) or size.value is not None for size in value.shape)
    )


@cache
def _rules() -> tuple[Any, ...]:
    """The default rules of onnxscript, each tried only on nodes of the operation at which its pattern ends."""
    from onnxscript import rewriter

    return tuple(map(_ending_at_its_operation, rewriter._DEFAULT_REWRITE_RULES))


def _ending_at_its_operation(rule: Any) -> Any:
    identifier = rule._target_pattern.output_nodes[0].op_identifier()
    if identifier is None:
        return rule
    chosen = copy.copy(rule)

    def try_rewrite(model: Any, graph: Any, node: Any, **options: Any) -> Any:
        if (node.domain, node.op_type) != identifier[:2]:
            return None
        return rule.try_rewrite(model, graph, node, **options)

    chosen.try_rewrite = try_rewrite
    return chosen
