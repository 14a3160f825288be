"""What a dialogue is, and the layouts that people have it in."""
