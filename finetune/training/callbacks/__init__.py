"""What happens around the steps of a run: when to evaluate and save, what is said, measured and told."""
