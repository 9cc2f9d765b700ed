"""A model as a graph: export, its inputs and outputs, its layers, rewriting."""
