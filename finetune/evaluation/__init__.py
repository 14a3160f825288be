"""Generation, scores and predictions: in training and on their own, with the same numbers."""
