"""Whether a sentence of a film review is kind: MiniLM with a classification head, sentences of any length."""
