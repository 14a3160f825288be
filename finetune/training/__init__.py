"""Training: from a config to a run directory with checkpoints and scores."""
