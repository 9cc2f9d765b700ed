"""Finds which channels of a model must be removed together."""
