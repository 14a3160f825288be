"""Dialogues: files in, tokens with their supervised spans out."""
