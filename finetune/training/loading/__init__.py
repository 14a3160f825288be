"""Examples, prepared or streamed -> one process's micro-batches."""
