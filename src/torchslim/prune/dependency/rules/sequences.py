"""Rules for packed sequences of different lengths, and for sums of looked-up rows."""

from __future__ import annotations

from collections.abc import Sequence

from torchslim.core.reason import Reason
from torchslim.prune.dependency.propagation import Layers, varying
from torchslim.prune.dependency.rules.registry import Call, rule


@rule("_pack_padded_sequence")
def pack(call: Call) -> Sequence[Layers]:
    """Join time and batch into one dimension, without the padding; features pass."""
    layers = call.tagger.along(call.layers_of(call.args[0]), (0, 1), "positions in a sequence stay")
    call.tagger.freeze(call.layers_of(call.args[1]), "lengths of sequences stay")
    return (tuple(core.squeeze(0) for core in layers),)


@rule("_pad_packed_sequence")
def pad_packed(call: Call) -> Sequence[Layers]:
    """Split the joined dimension into time and batch; features pass."""
    layers = call.tagger.along(call.layers_of(call.args[0]), (0,), "positions in a sequence stay")
    call.tagger.freeze(call.layers_of(call.args[1]), "lengths of sequences stay")
    return (tuple(core.unsqueeze(0) for core in layers),)


@rule("_embedding_bag", "_embedding_bag_forward_only")
def embedding_bag(call: Call) -> Sequence[Layers]:
    """Sums, means or maxima of rows that are looked up by data: the rows stay, their columns may be removed."""
    layers, shape = call.operand(call.args[0])
    call.tagger.freeze([core for core in layers if 0 in varying(core)], Reason.LOOKED_UP)
    for tensor in list(call.tensors())[1:]:
        call.tagger.freeze(call.layers_of(tensor), "a table of positions")
    columns = tuple(core for core in layers if varying(core) == {1})
    return [columns if tuple(output.shape[1:]) == tuple(shape[1:]) else () for output in call.outputs]
