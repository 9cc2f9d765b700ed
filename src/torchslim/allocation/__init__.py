"""Choices under limits: tables of damage and of costs over decisions, and a solver for them. Imports no torch."""
