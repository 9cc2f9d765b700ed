"""Least-squares updates of the weights that remain after pruning."""
