"""Programs that answer in the place of our own generation."""
