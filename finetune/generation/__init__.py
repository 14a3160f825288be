"""Prompts in, replies out: the one place that generates."""
