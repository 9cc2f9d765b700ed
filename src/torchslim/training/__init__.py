"""The one training loop, with optimizers, loaders, devices and sharding."""
