"""A table of numbers: an embedding for each range of each column, and a perceptron behind them."""
