"""The model in between: held-out data, what must not be forgotten, and which checkpoint is the best."""
