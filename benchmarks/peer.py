"""Torch-Pruning as its own examples use it: heads of attention told, output layers kept, sizes of attention mended.

Source: the examples of https://github.com/VainF/Torch-Pruning for torchvision, timm, Transformers and LLMs.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.outputs import main_outputs
from benchmarks.zoo import Inputs
from torchslim.core.batches import call

RATIO = 0.5
FUSED = ("qkv", "qkv_proj", "query_key_value", "Wqkv")
SEPARATE = (("query", "key", "value"), ("q_proj", "k_proj", "v_proj"), ("q_lin", "k_lin", "v_lin"), ("q", "k", "v"))
HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head")
HEAD_SIZES = ("head_dim", "attention_head_size", "key_value_proj_dim")
WIDTHS = ("all_head_size", "attn_dim", "inner_dim", "embed_dim", "dim", "split_size", "hidden_size")


@dataclass(frozen=True, slots=True)
class Attention:
    """A module with heads, and its projections: one of thrice the width, or three."""

    module: nn.Module
    projections: tuple[nn.Linear, ...]
    heads: int
    key_heads: int

    @property
    def width(self) -> int:
        """What all heads of the queries have together."""
        return self.projections[0].out_features // (3 if len(self.projections) == 1 else 1)


def attentions(model: nn.Module) -> Iterator[Attention]:
    """Every attention whose heads the peer has to be told of."""
    for module in model.modules():
        config = getattr(module, "config", None)
        heads = next((h for s in (module, config) for n in HEADS if isinstance(h := getattr(s, n, None), int)), None)
        if not heads:
            continue
        names = [(name,) for name in FUSED] + list(SEPARATE)
        for each in names:
            layers = tuple(getattr(module, name, None) for name in each)
            if all(isinstance(layer, nn.Linear) for layer in layers):
                size = layers[0].out_features // heads
                keys = layers[1].out_features // size if len(layers) == 3 and size else heads
                yield Attention(module, layers, heads, keys)
                break


def ways(model: nn.Module) -> tuple[str, ...]:
    """How the peer's examples would prune this model, the likeliest first."""
    if hasattr(model, "rpn"):  # its examples for two-stage detectors keep either the predictors or all of the heads
        return ("predictors kept", "heads kept")
    if not any(True for _ in attentions(model)):
        return ("plain",)
    decoder = any(part in type(model).__name__ for part in ("CausalLM", "LMHead"))
    return ("whole heads", "part of each head") if decoder else ("part of each head", "whole heads")


@dataclass(frozen=True, slots=True)
class Prepared:
    """The peer's pruner of a model, its dependency graph built, and what has to be mended after it."""

    model: Any
    pruner: Any
    found: list[Attention]
    widths: Mapping[int, tuple[int, int]]
    first: bool  # torchvision's ViT

    def prune(self, trace: Callable[[Any, Any], None] | None = None) -> nn.Module:
        """Half of the channels of every layer gone, in place; `trace` sees every group before it is pruned."""
        for group in self.pruner.step(interactive=True):
            if trace is not None:
                trace(self.pruner.DG, group)
            group.prune()
        if self.first:
            self.model.hidden_dim = self.model.conv_proj.out_channels
        for each in self.found:
            _mend(each, self.pruner.num_heads, *self.widths[id(each.module)])
        self.model.zero_grad()
        return self.model  # type: ignore[no-any-return]


def prune_with_peer(
    model: nn.Module, inputs: Inputs, way: str = "plain", trace: Callable[[Any, Any], None] | None = None
) -> nn.Module:
    """Half of the channels of every layer gone, in place.

    Args:
        model: changed.
        inputs: as the model takes them.
        way: one of `ways`; its examples for LLMs drop whole heads, those for ViTs a part of each head.
        trace: called with the dependency graph and each group before it is pruned.
    """
    return prepare_peer(model, inputs, way).prune(trace)


def prepare_peer(
    model: nn.Module, inputs: Inputs, way: str = "plain", ignored: list[nn.Module] | None = None
) -> Prepared:
    """The pruner as the peer's examples build it.

    Args:
        model: as for `prune_with_peer`, as are the inputs and the way.
        inputs: see there.
        way: see there.
        ignored: the output layers where they are known, which its examples write down; else found by a run.
    """
    import torch_pruning as tp

    whole_heads = way == "whole heads"
    found = list(attentions(model))
    heads = {
        layer: each.key_heads if position else each.heads
        for each in found
        for position, layer in enumerate(each.projections)
    }
    fused_gates = [module.gate_up_proj for module in model.modules() if hasattr(module, "gate_up_proj")]
    pairs = {layer: 2 for layer in fused_gates if isinstance(layer, nn.Linear)}
    widths = {id(each.module): (each.width, each.width // each.heads) for each in found}
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    first = type(model).__name__ == "VisionTransformer" and hasattr(model, "conv_proj")  # torchvision's
    pruner = tp.pruner.BasePruner(
        model,
        inputs if isinstance(inputs, dict) else list(inputs),
        importance=tp.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=RATIO,
        ignored_layers=output_layers(model, inputs, way) if ignored is None else ignored,
        num_heads=dict(heads),
        prune_num_heads=whole_heads,
        prune_head_dims=not whole_heads,
        head_pruning_ratio=RATIO if whole_heads else 0.0,
        out_channel_groups=pairs,
        in_channel_groups={},
        output_transform=_differentiable,
        round_to=model.encoder.layers[0].num_heads if first else None,
    )
    return Prepared(model, pruner, found, widths, first)


def _mend(attention: Attention, heads: Mapping[nn.Module, int], width: int, size: int) -> None:
    """Write the sizes after pruning where the module's own code reads them."""
    now = heads.get(attention.projections[0], attention.heads)
    keys = heads.get(attention.projections[1], now) if len(attention.projections) == 3 else now
    values = dict.fromkeys(HEADS, now) | dict.fromkeys(HEAD_SIZES, attention.width // now)
    values |= {name: attention.width for name in WIDTHS if getattr(attention.module, name, None) == width}
    values |= {"num_key_value_groups": now // keys if keys else 1}
    for name, value in values.items():
        if isinstance(vars(attention.module).get(name), int):
            setattr(attention.module, name, value)


def _differentiable(output: Any) -> list[Tensor]:
    return [leaf for leaf in main_outputs(output) if leaf.grad_fn is not None]


def output_layers(model: Any, inputs: Inputs, way: str = "plain") -> list[nn.Module]:
    """The layers that the outputs come from: the peer must leave their width alone."""
    if hasattr(model, "rpn"):
        layers = [model.rpn.head.cls_logits, model.rpn.head.bbox_pred]
        if way == "heads kept":
            return [*layers, model.backbone.fpn, model.roi_heads]
        predictors = ("box_predictor", "mask_predictor", "keypoint_predictor")
        return layers + [each for name in predictors if (each := getattr(model.roi_heads, name, None)) is not None]
    head = getattr(model, "head", None)
    if hasattr(head, "classification_head"):  # detectors in one stage
        if not hasattr(head.classification_head, "cls_logits"):
            return [head]
        boxes = [getattr(head.regression_head, name, None) for name in ("bbox_reg", "bbox_ctrness")]
        return [head.classification_head.cls_logits, *(layer for layer in boxes if layer is not None)]
    embeddings = getattr(model, "get_output_embeddings", lambda: None)()
    if embeddings is not None:
        return [embeddings]
    kinds = (nn.Linear, nn.modules.conv._ConvNd)
    ran: list[nn.Module] = []
    hooks = [
        module.register_forward_hook(lambda module, *_: ran.append(module))
        for module in model.modules()
        if isinstance(module, kinds)
    ]
    with torch.no_grad():
        leaves = main_outputs(call(model, inputs))
    for hook in hooks:
        hook.remove()
    found = []
    for leaf in leaves:
        fits = [m for m in ran if _width(m) == leaf.shape[-1 if isinstance(m, nn.Linear) else min(1, leaf.dim() - 1)]]
        # a thousand classes are told by their number; few outputs may equal a hidden width, so only the last layer is
        found += fits if leaf.shape[-1] == 1000 else fits[-1:]
    return list({id(module): module for module in found}.values())


def _width(layer: Any) -> int:
    return int(layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels)


class Removed:
    """Which of the original channels the peer removed, by layer and side, to zero the same ones in the original."""

    SIMPLE = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.BatchNorm1d, nn.BatchNorm2d)

    def __init__(self, model: nn.Module) -> None:
        self.names = {module: name for name, module in model.named_modules()}
        self.kept: dict[tuple[str, bool], list[int]] = {}
        self.comparable = True

    def __call__(self, graph: Any, group: Any) -> None:
        """Note a group that is about to be pruned."""
        drop: dict[tuple[str, bool], set[int]] = {}
        layers = {}
        for dependency, positions in group:
            module, out = dependency.target.module, graph.is_out_channel_pruning_fn(dependency.handler)
            if str(dependency.target.type) == "OPTYPE.PARAMETER":
                self.comparable = False
                continue
            if module not in self.names:  # its own stand-in for an operation
                continue
            grouped = getattr(module, "groups", 1)
            depthwise = grouped > 1 and grouped == module.in_channels == module.out_channels
            if not isinstance(module, self.SIMPLE) or (grouped > 1 and not depthwise):
                self.comparable = False
                continue
            key = (self.names[module], out or depthwise or isinstance(module, nn.modules.batchnorm._BatchNorm))
            drop.setdefault(key, set()).update(int(getattr(each, "idx", each)) for each in positions)
            layers[key] = module
        for key, positions in drop.items():
            channels = self.kept.get(key) or list(range(_channels(layers[key], key[1])))
            self.kept[key] = [channel for position, channel in enumerate(channels) if position not in positions]

    @torch.no_grad()
    def zeroed(self, original: nn.Module) -> nn.Module:
        """A copy of the original that ignores what was removed."""
        model = copy.deepcopy(original)
        for (name, out), kept in self.kept.items():
            module: Any = model.get_submodule(name)
            gone = torch.ones(_channels(module, out), dtype=torch.bool)
            gone[torch.tensor(kept, dtype=torch.long)] = False
            if out:
                module.weight[gone] = 0
                if module.bias is not None:
                    module.bias[gone] = 0
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.running_mean[gone] = 0
            else:
                module.weight[:, gone] = 0
        return model


def _channels(module: Any, out: bool) -> int:
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return int(module.num_features)
    if isinstance(module, nn.Linear):
        return int(module.out_features if out else module.in_features)
    return int(module.out_channels if out else module.in_channels)
