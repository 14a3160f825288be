"""Token ids -> stored examples -> batches."""
