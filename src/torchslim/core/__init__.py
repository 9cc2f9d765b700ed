"""What every room uses: steps, tasks, files, checks of values. It imports torch alone."""
