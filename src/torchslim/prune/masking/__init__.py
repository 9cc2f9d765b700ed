"""Single weights set to zero: patterns, selection, masks."""
