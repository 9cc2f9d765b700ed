"""Who speaks: series of any length through a bidirectional LSTM with packed sequences."""
