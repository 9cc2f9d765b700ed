"""Distillation: a student learns from a teacher's outputs."""

from torchslim.distill.losses import LOSSES
from torchslim.distill.response import DIST, DKD, KD, MSE, kl_divergence
from torchslim.distill.step import Distill

__all__ = ["DIST", "DKD", "KD", "LOSSES", "MSE", "Distill", "kl_divergence"]
