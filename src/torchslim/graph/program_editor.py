"""An editor of exported programs: stores tensors, inserts traced operations, and gives a new program."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import ExportGraphSignature, InputKind, InputSpec, TensorArgument
from torch.fx import Node
from torch.fx.experimental.proxy_tensor import make_fx

from torchslim.graph.layers import stored_tensors
from torchslim.graph.rewrite import graft


class Editor:
    """Rewrites a copy of an exported program."""

    def __init__(self, program: ExportedProgram) -> None:
        self.program = program
        self.module = copy.deepcopy(program.graph_module)  # operations only: the weights are in the state
        self.graph = self.module.graph
        self.state: dict[str, Any] = dict(program.state_dict)
        signature = program.graph_signature
        self.specs = list(signature.input_specs)
        self.stored = stored_tensors(program)
        self.added: dict[tuple[int, str], Node] = {}
        self.alive: list[Tensor] = []
        self.changed = False

    def constant(self, node: Node) -> Tensor | None:
        """The stored tensor that a node stands for, if any."""
        return self.stored.get(node.name) if node.op == "placeholder" else None

    def store(self, value: Tensor, purpose: str, make: Callable[[Tensor], Tensor] = lambda value: value) -> Node:
        """Input node of a tensor made from a stored one; the same node for the same tensor and `purpose`."""
        key = (id(value), purpose)
        if key not in self.added:
            first = next(iter(self.graph.nodes))
            tensor = make(value).contiguous()
            mode = next(
                node.meta["val"].fake_mode for node in self.graph.nodes if hasattr(node.meta.get("val"), "fake_mode")
            )
            with self.graph.inserting_before(first):
                node = self.graph.placeholder(f"{purpose}_{len(self.added)}")
            node.meta["val"] = mode.from_tensor(tensor, static_shapes=True)
            self.state[node.name] = tensor
            self.stored[node.name] = tensor
            spec = InputSpec(InputKind.BUFFER, TensorArgument(name=node.name), target=node.name, persistent=True)
            self.specs.insert(0, spec)
            self.added[key] = node
            self.alive.append(value)  # keep it alive, so that no other tensor gets its id
        return self.added[key]

    def trace(self, before: Node, function: Callable[..., Any], inputs: Sequence[Node | None], owner: Node) -> Any:
        """Insert the operations of `function` on `inputs` into the layer of `owner`; return the result's nodes."""
        nodes = [input_ for input_ in inputs if input_ is not None]
        values = [node.meta["val"] for node in nodes]

        def positional(*tensors: Any) -> Any:
            rest = iter(tensors)
            return function(*(None if input_ is None else next(rest) for input_ in inputs))

        mode = next(value.fake_mode for value in values if hasattr(value, "fake_mode"))
        with mode:
            traced = make_fx(positional)(*values)
        self.changed = True
        return graft(self.graph, traced.graph, nodes, before, owner)

    def replace(self, node: Node, function: Callable[..., Any], inputs: Sequence[Node | None]) -> None:
        """Replace `node` by `function` of `inputs`."""
        result = self.trace(node, function, inputs, node)
        if isinstance(result, Node):
            node.replace_all_uses_with(result)
        else:
            for user in list(node.users):
                user.replace_all_uses_with(result[user.args[1]])
                self.graph.erase_node(user)
        self.graph.erase_node(node)

    def finished(self) -> ExportedProgram:
        """The rewritten program, without weights that are no longer read; the original if nothing changed."""
        if not self.changed:
            return self.program
        program = self.program
        self.graph.eliminate_dead_code()
        used_names = {node.name for node in self.graph.nodes if node.op != "placeholder" or node.users}
        kept_specs = [spec for spec in self.specs if spec.kind == InputKind.USER_INPUT or spec.arg.name in used_names]
        for node in list(self.graph.nodes):
            if node.op == "placeholder" and not node.users and node.name not in {spec.arg.name for spec in kept_specs}:
                self.graph.erase_node(node)
        targets = {spec.target for spec in kept_specs}
        results: Sequence[Any] = self.graph.output_node().args[0]
        outputs = [
            replace(spec, arg=TensorArgument(name=result.name)) if isinstance(result, Node) else spec
            for spec, result in zip(program.graph_signature.output_specs, results, strict=True)
        ]
        self.module.recompile()
        return ExportedProgram(
            root=self.module,
            graph=self.graph,
            graph_signature=ExportGraphSignature(kept_specs, outputs),
            state_dict={name: value for name, value in self.state.items() if name in targets},
            range_constraints=program.range_constraints,
            module_call_graph=program.module_call_graph,
            constants={name: value for name, value in program.constants.items() if name in targets},
            verifiers=program.verifiers,
        )
