"""Sharing runs on the Hub: cards, pushes, training state without pickle, and what to do with the runs of others."""
