"""How sensitive a model is to each compression, and what that is measured with."""
