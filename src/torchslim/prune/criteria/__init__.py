"""Importance scores, and the statistics that they need."""
