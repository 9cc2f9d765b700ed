"""Distillation: a student learns from a teacher's outputs."""

from torchslim.distill.losses import KD, LOSSES, kl_divergence
from torchslim.distill.step import Distill

__all__ = ["KD", "LOSSES", "Distill", "kl_divergence"]
