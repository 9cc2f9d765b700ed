"""Widths chosen by their measured latency."""
