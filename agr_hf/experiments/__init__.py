"""Runs over optimizers and seeds: tables, plots, reports."""
