"""What training would see of a data file."""
