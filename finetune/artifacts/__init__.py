"""What lies on disk: bases, adapters, checkpoints, runs and their file names."""
