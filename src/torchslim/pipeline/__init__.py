"""One run of a recipe: its steps, stages, files and measurements."""
