"""What happens around the steps: when to evaluate, save and stop; what is logged, shown and profiled."""
