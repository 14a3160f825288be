"""Chat layouts: a module for each way in which checkpoints lay dialogues out."""
