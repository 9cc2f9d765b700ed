"""Starters for `torchslim init`: a task and a recipe by kind of data, which run as they are."""
