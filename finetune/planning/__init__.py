"""What a run will cost, counted on tensors that have shapes and no numbers."""
