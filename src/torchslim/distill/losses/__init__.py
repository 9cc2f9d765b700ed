"""Distillation losses and their registry."""
