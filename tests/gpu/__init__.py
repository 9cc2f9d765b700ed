"""Tests that need CUDA; see CONTRIBUTING.md for running them on another device."""
