"""The measured cost of every choice: time on the target, bytes, MACs, parameters and memory."""
