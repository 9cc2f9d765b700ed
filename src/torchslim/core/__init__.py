"""Code that every part of the package uses: steps, tasks, files, checks. Imports no other part except `errors`."""
