"""Dates in words to numbers: an encoder and a decoder, and a loop that decodes greedily."""
