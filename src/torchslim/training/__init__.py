"""The one training loop, with optimizers, loaders, devices and sharding."""

from torchslim.training.loop import FitReport, Hook, fit

__all__ = ["FitReport", "Hook", "fit"]
