"""Conversion of a prepared model with observed ranges to a graph on integers."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch.fx import GraphModule

from torchslim.core.isolation import copy_model, preserved_globals, quiet
from torchslim.graph.rewrite import inputs_first, strip_unused
from torchslim.graph.row_ranges import rows_in_place_of_tensors
from torchslim.quantize.modules import Prepared, QuantizedModule


def integers(prepared: Prepared, released: Collection[str] = ()) -> QuantizedModule:
    """Convert a prepared model to integers, without checking the result.

    Args:
        prepared: calibrated or trained model.
        released: keys of the units that stay in float, see `units.units_of`.
    """
    with quiet():
        from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e

        from torchslim.quantize.batch_norm_folding import fold_batch_norms, hide_batch_norms, settle, show_batch_norms
        from torchslim.quantize.lowering import fit_biases, gather_first, store_groups
        from torchslim.quantize.sharing import keep_own_grids
        from torchslim.quantize.units import release, units_of
    copied = copy_model(prepared)[0].cpu()
    program = copied.program
    assert isinstance(program, GraphModule)
    with quiet(), preserved_globals(), torch.no_grad():
        if released:
            release(program, units_of(program), released)
        if prepared.qat:
            settle(program)
            fold_batch_norms(program)
        else:  # a network that was trained with shared grids keeps them
            keep_own_grids(program)
        fit_biases(program)
        store_groups(program)
        hide_batch_norms(program)
        program = convert_pt2e(program)
        show_batch_norms(program)
        gather_first(program)
        rows_in_place_of_tensors(program)
        inputs_first(program.graph)
        program.graph.eliminate_dead_code()
        program.recompile()
        strip_unused(program)
    return QuantizedModule(
        program,
        prepared.forward_signature,
        prepared.inputs,
        prepared.outputs,
        prepared.classes,
        records=prepared.records,
        input_sizes=prepared.input_sizes,
        origin=prepared.origin,
    )
