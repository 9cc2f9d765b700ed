"""The quantizer: marks the ATen nodes of an exported graph that compute on integers.

It looks at operations, not at module classes, so it finds subclasses of Conv2d and functional calls. A runtime's
profile lists the pairs of quantize and dequantize that the runtime needs. The pair of an output goes behind a following
relu or relu6, and operations that only move values keep the scale of their input.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from operator import getitem
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torchao.quantization.pt2e.quantizer import (
    QuantizationAnnotation,
    QuantizationSpec,
    Quantizer,
    SharedQuantizationSpec,
)

from torchslim.core.reason import Reason
from torchslim.core.step import LayerRecord
from torchslim.graph.decompose import SILU
from torchslim.graph.export import layer_of
from torchslim.quantize.annotation_ends import end_of_concat, end_of_layer, flat, layer_before, quantized_output
from torchslim.quantize.aten_ops import (
    ADDITIONS,
    ANNOTATION,
    BATCH_NORMS,
    CONCATS,
    EMBEDDINGS,
    GATED,
    GATES,
    LAYER_NORMS,
    MOVES,
    POOLS,
    PRODUCTS,
    RECURRENT,
    SPLITS,
    Weighted,
    argument,
    is_constant,
    op_name,
    padded_with_infinity,
    shape_of,
    stored_name,
    weighted,
    weights_of,
)
from torchslim.quantize.backend_profiles import Profile
from torchslim.quantize.schemes import SCHEMES, Scheme

COMPUTES_ON_INTEGERS = "torchslim_integers"  # True for a node that computes on static integers, not only moves them
# of a concatenation that is rounded to one grid, or of the clamp behind it: the indices of its float parts
SHARED_GRID = "torchslim_shared_grid"
FLOATS = (torch.float32, torch.float16, torch.bfloat16)  # what the quantize operations take
WEIGHTS_ONLY = SCHEMES["int8-weights"]
ONE_RANGE = "its kernels round all steps and samples of a call with one range: results depend on the batch and padding"


@dataclass(frozen=True, slots=True, kw_only=True)
class Specs:
    """How values are observed: made by `fake_quantize.specs`, from observers or modules that also round in training.

    `dynamic` has one range for the input of a recurrent layer, `rows` one for each row of a linear layer's input;
    `weight` takes the scheme and the axis of the outputs.
    """

    static: QuantizationSpec
    dynamic: QuantizationSpec
    rows: QuantizationSpec
    weight: Callable[[Scheme, int], QuantizationSpec]


class SlimQuantizer(Quantizer):
    """Annotates layers with weights, residual additions, concatenations, and operations that move values.

    Args:
        scheme_of: returns the scheme of a layer from its path and the path of its weight; None: it stays in float.
        profile: profile of the runtime.
        specs: how values are observed.
    """

    def __init__(self, scheme_of: Callable[[str, str], Scheme | None], profile: Profile, specs: Specs) -> None:
        self.scheme_of, self.profile, self.specs = scheme_of, profile, specs
        self.records: list[LayerRecord] = []
        self.schemes: dict[Node, Scheme] = {}  # of the layers with integer weights

    def annotate(self, model: GraphModule) -> GraphModule:
        """Mark the nodes to quantize, and record the layers, with the reason where one stays in float."""
        self.records, self.schemes = [], {}
        between = {
            **dict.fromkeys(GATES, self._gate),
            **dict.fromkeys(GATED, self._gated),
            **dict.fromkeys(ADDITIONS, self._addition),
            **dict.fromkeys(CONCATS, self._concat),
        }
        for node in model.graph.nodes:
            if node.op != "call_function":
                continue
            if layer := weighted(node):
                self._weighted(node, layer)
            elif node.target in RECURRENT:
                self._recurrent(node)
            elif node.target in EMBEDDINGS:
                self._embedding(node)
            elif (mark := between.get(node.target)) is not None:
                if self._static(node):
                    mark(node)
            elif node.target in PRODUCTS:
                self._product(node)
            elif node.target in MOVES and quantized_output(argument(node, 0)):
                self._move(node)
            elif node.target is getitem:
                self._part(node)
            elif node.target not in BATCH_NORMS and any(weights_of(node)) and not is_constant(node):
                self._refuse(node, f"{op_name(node)} has no integer kernel")
        self._pool_integers(model)
        return model

    def _pool_integers(self, model: GraphModule) -> None:
        """Round a pool's input where all its readers round its output: the layer before then returns integers."""
        for node in reversed(model.graph.nodes):
            if node.target in POOLS and ANNOTATION not in node.meta and node.users and not padded_with_infinity(node):
                readers = [user.meta.get(ANNOTATION) for user in node.users]
                if all(
                    reader is not None and reader.input_qspec_map.get(node) is self.specs.static for reader in readers
                ):
                    self._move(node)

    def _move(self, node: Node) -> None:
        """Mark a move: runtimes move integers and assume that scale and zero point stay the same."""
        source = argument(node, 0)
        node.meta[ANNOTATION] = QuantizationAnnotation(
            input_qspec_map={source: self.specs.static},
            output_qspec=SharedQuantizationSpec((source, node)),
            _annotated=True,
        )

    def takes_product(self, node: Node) -> bool:
        """Whether a product of two activations, or an operation that decomposes into one, computes on integers."""
        if node.target in SILU:
            return self.profile.gates and self._static(node)
        return self.profile.products and self._static(node)

    def _gate(self, node: Node) -> None:
        """Mark a sigmoid of a convolution: on integers it is a table lookup."""
        source = argument(node, 0)
        ends = source is not None and self._ends_convolution(source) and quantized_output(source)
        if self.profile.gates and source is not None and ends:
            self._mark(node, {source: self.specs.static}, self.specs.static)

    def _gated(self, node: Node) -> None:
        """Mark the product of a gate and its factor, where both are integers already."""
        factors = [argument(node, index) for index in (0, 1)]
        if any(factor is not None and factor.target in GATES and quantized_output(factor) for factor in factors):
            inputs = [factor for factor in factors if factor is not None and quantized_output(factor)]
            if self.profile.gates and len(inputs) == 2:
                self._mark(node, dict.fromkeys(inputs, self.specs.static), self.specs.static)

    def validate(self, model: GraphModule) -> None:
        """Check nothing: the runtimes accept every annotation of this class."""

    # layers with weights ----------------------------------------------------------------------------------------------

    def _weighted(self, node: Node, layer: Weighted) -> None:
        source, weight = argument(node, layer.source), argument(node, layer.weight)
        if source is None or weight is None or not is_constant(weight):
            self._refuse(node, "its weight is computed from the input, not stored")
            return
        if (scheme := self._scheme(node, weight)) is None:
            return
        reason = ""
        integer = self.profile.static if scheme.activations == "static" else self.profile.dynamic
        if scheme.activations != "float" and layer.kind not in integer:
            reason = f"{self.profile.why}: weights in int8, computing in float"
            if scheme.activations == "dynamic":
                reason = f"no runtime computes {layer.kind} with dynamic ranges: weights in int8, computing in float"
            scheme = WEIGHTS_ONLY
        elif scheme.activations == "dynamic" and shape_of(weight)[layer.axis] <= self.profile.narrow:
            reason = f"rounding its input takes longer than a product with {shape_of(weight)[layer.axis]} outputs"
            reason, scheme = f"{reason}: weights in int8, computing in float", WEIGHTS_ONLY
        elif scheme.activations != "float" and is_constant(source):
            reason, scheme = "its input is stored, too: weights in int8, computing in float", WEIGHTS_ONLY
        inputs: dict[Node, Any] = {weight: self.specs.weight(scheme, layer.axis)}
        output = None
        if scheme.activations == "dynamic":
            inputs[source] = self.specs.rows
        elif scheme.activations == "static":
            inputs[source] = self.specs.static
            # a linear layer can return float at no cost: for float readers, eight bits would only lose accuracy
            to_integers = layer.kind != "linear" or self._feeds_integers(end_of_layer(node))
            output = self.specs.static if layer.kind in self.profile.outputs and to_integers else None
        self._mark(node, inputs, output)
        self._quantized(node, scheme, reason)

    def _recurrent(self, node: Node) -> None:
        parameters = [tensor for tensor in flat(node.args[2]) if len(shape_of(tensor)) == 2]
        if not all(is_constant(parameter) for parameter in parameters):
            self._refuse(node, "its weights are computed from the input, not stored")
            return
        if (scheme := self._scheme(node, *parameters)) is None:
            return
        reason = ""
        activations = scheme.activations
        if scheme.weight_bits < 8:
            reason, scheme = "recurrent layers go down to 8 bits only", WEIGHTS_ONLY
        elif activations == "static":
            reason = "no runtime computes it with static ranges: weights in int8, computing in float"
            scheme = WEIGHTS_ONLY
        elif activations == "dynamic" and RECURRENT[node.target] not in self.profile.dynamic:
            reason, scheme = f"{self.profile.why}: weights in int8, computing in float", WEIGHTS_ONLY
        inputs: dict[Node, Any] = {parameter: self.specs.weight(scheme, 0) for parameter in parameters}
        source = argument(node, 0)
        if scheme.activations == "dynamic" and source is not None:
            inputs[source], reason = self.specs.dynamic, ONE_RANGE
        self._mark(node, inputs, None)
        self._quantized(node, scheme, reason)

    def _embedding(self, node: Node) -> None:
        table = argument(node, 0)
        if table is None or not is_constant(table):
            return
        scheme = self._scheme(node, table)
        if scheme is None or scheme.activations == "static":
            return  # a lookup only reads rows: there is nothing to compute
        self._mark(node, {table: self.specs.weight(WEIGHTS_ONLY, 0)}, None)
        self._quantized(node, WEIGHTS_ONLY, "")

    def _product(self, node: Node) -> None:
        """Mark a product of two activations: both factors get their own range, the result stays float."""
        if is_constant(node) or not isinstance(node.meta.get("val"), Tensor):
            return
        factors = [argument(node, index) for index in PRODUCTS[node.target]]
        if not self.takes_product(node) or None in factors:
            return
        self._mark(node, dict.fromkeys((factor for factor in factors if factor is not None), self.specs.static), None)

    # operations between layers ----------------------------------------------------------------------------------------

    def _addition(self, node: Node) -> None:
        """Mark an addition of two tensors of one shape, at least one of them a convolution's output.

        Elsewhere (the residual stream of a transformer) eight bits lose too much: DeiT-tiny fell from 28 dB to 7.
        """
        terms = self._residual(node)
        if terms is None:
            return
        if self.profile.additions == "both":
            self._mark(node, dict.fromkeys(terms, self.specs.static), self.specs.static)
        elif self.profile.additions == "other":
            self._mark(node, {terms[1]: self.specs.static}, None)

    def _residual(self, node: Node) -> tuple[Node, Node] | None:
        """The terms of a residual addition; the output of the layer that can add the other at its end comes first."""
        left, right = argument(node, 0), argument(node, 1)
        if left is None or right is None or left is right or node.kwargs.get("alpha", 1) != 1:
            return None
        if shape_of(left) != shape_of(right) or not shape_of(left):
            return None
        sums = [term for term in (left, right) if self._ends_convolution(term)]
        if not sums:
            return None
        # an earlier sum has been computed by its own layer, so it is the other term
        last = next((term for term in sums if weighted(layer_before(term)) and len(term.users) == 1), sums[-1])
        return last, left if last is right else right

    def _concat(self, node: Node) -> None:
        """Mark a concatenation that a layer on integers reads: its parts then share a grid.

        Where only float operations read it, or it is an output, the parts keep grids of their own: on one grid with
        boxes in pixels, scores were all rounded to 0. Where both read it, `sharing.keep_own_grids` decides by the
        ranges. A concatenation that a norm reads is the residual stream and is left out: on the grid of the patches,
        the class token of CoaT lost all but 2.5 dB.
        """
        last = end_of_concat(node)
        if not self.profile.concats or not self._reaches_integers(last) or self._feeds_norm(node):
            return
        parts = [part for part in flat(node.args[0]) if isinstance(part.meta.get("val"), Tensor)]
        floats = [index for index, part in enumerate(parts) if not quantized_output(part)]
        if len(floats) < len(parts):
            self._mark(node, dict.fromkeys(parts, self.specs.static), self.specs.static)
            last.meta[SHARED_GRID] = floats

    def _part(self, node: Node) -> None:
        """Mark a part of a split tensor, on the grid of the whole tensor."""
        split = argument(node, 0)
        source = argument(split, 0) if split is not None and split.target in SPLITS else None
        if source is not None and quantized_output(source):
            node.meta[ANNOTATION] = QuantizationAnnotation(output_qspec=SharedQuantizationSpec(source), _annotated=True)

    def _ends_convolution(self, node: Node) -> bool:
        node = layer_before(node)
        layer = weighted(node)
        if layer is not None:
            scheme = self.schemes.get(node)
            return layer.kind.startswith("conv") and scheme is not None and scheme.activations == "static"
        return node.target in ADDITIONS and ANNOTATION in node.meta

    def _feeds_integers(self, node: Node) -> bool:
        """Whether only layers that compute on integers read a value, as it is or moved."""
        return bool(node.users) and all(self._takes_integers(user) for user in node.users)

    def _reaches_integers(self, node: Node) -> bool:
        """Whether any layer that computes on integers reads a value, as it is, moved, or as a part of others."""
        return any(self._takes_some_integers(user) for user in node.users)

    def _takes_some_integers(self, node: Node) -> bool:
        if node.target in (*MOVES, *SPLITS, *CONCATS, getitem):
            return self._reaches_integers(end_of_concat(node))
        factors = [argument(node, index) for index in (0, 1)]
        if node.target in GATED:
            return self.profile.gates and any(factor is not None and factor.target in GATES for factor in factors)
        if node.target in ADDITIONS:
            layers = [weighted(layer_before(factor)) for factor in factors if factor is not None]
            return self.profile.additions == "both" and any(layer and layer.kind.startswith("conv") for layer in layers)
        return self._takes_integers(node)

    def _feeds_norm(self, node: Node) -> bool:
        """Whether a norm of the channels reads a value, as it is or moved."""
        readers = [user for user in node.users if user.target in (*LAYER_NORMS, *MOVES)]
        return any(user.target in LAYER_NORMS or self._feeds_norm(user) for user in readers)

    def _takes_integers(self, node: Node) -> bool:
        if node.target in (*MOVES, *SPLITS, getitem):
            return self._feeds_integers(node)
        layer = weighted(node)
        if layer is None and node.target in PRODUCTS:
            return self.takes_product(node)
        weight = argument(node, layer.weight) if layer is not None else None
        if layer is None or weight is None or layer.kind not in self.profile.static:
            return False
        scheme = self.scheme_of(layer_of(node), stored_name(weight))
        return scheme is not None and scheme.activations == "static"

    # ------------------------------------------------------------------------------------------------------------------

    def _static(self, node: Node) -> bool:
        """Whether an operation without weights belongs to a layer that is quantized statically."""
        value = node.meta.get("val")
        scheme = self.scheme_of(layer_of(node), "")
        floating = isinstance(value, Tensor) and value.dtype in FLOATS
        return floating and scheme is not None and scheme.activations == "static"

    def _scheme(self, node: Node, *stored: Node) -> Scheme | None:
        """The scheme of a layer; None, with a record, where it stays in float."""
        value = node.meta.get("val")
        value = value[0] if isinstance(value, (tuple, list)) else value
        if isinstance(value, Tensor) and value.dtype not in FLOATS:
            self._refuse(node, f"it computes in {value.dtype}; convert the model with .float()")
            return None
        schemes = [self.scheme_of(layer_of(node), stored_name(tensor)) for tensor in stored]
        if None in schemes or not schemes:
            self._refuse(node, Reason.AS_ASKED)
            return None
        return schemes[0]

    def _mark(self, node: Node, inputs: Mapping[Node, Any], output: Any) -> None:
        last = end_of_layer(node) if output is not None else node
        node.meta[ANNOTATION] = QuantizationAnnotation(
            input_qspec_map=dict(inputs),
            output_qspec=output if last is node else None,
            _annotated=True,
        )
        node.meta[COMPUTES_ON_INTEGERS] = any(spec is self.specs.static for spec in inputs.values())
        if last is not node:
            last.meta[ANNOTATION] = QuantizationAnnotation(output_qspec=output, _annotated=True)

    def _quantized(self, node: Node, scheme: Scheme, reason: str) -> None:
        self.schemes[node] = scheme
        self.records.append(
            LayerRecord(
                layer=layer_of(node),
                action="quantized",
                reason=reason,
                weight_bits=scheme.weight_bits,
                activation_bits=scheme.activation_bits,
            )
        )

    def _refuse(self, node: Node, reason: str) -> None:
        self.records.append(LayerRecord(layer=layer_of(node), action="refused", reason=reason))
