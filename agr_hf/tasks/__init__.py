"""Data, models and metrics of the experiments."""
