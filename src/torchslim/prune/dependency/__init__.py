"""Which channels of a model must go together."""
