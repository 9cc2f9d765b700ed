"""Deploy, measure, save and load models."""
