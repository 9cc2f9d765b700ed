"""Channels physically removed: plan, surgery, proof."""
