"""Runs under DeepSpeed: its configuration, its engine, and a model that is cut over processes."""
