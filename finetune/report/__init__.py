"""Evaluations as pages, plots and tables."""
